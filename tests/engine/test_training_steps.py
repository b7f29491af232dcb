"""One step of a training: what is averaged, what is used, and what happens where a value is not finite."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_runs import EPOCH_STEPS, STEPS, assert_same_bits, tiny, training
from torch import Tensor, nn
from torch.nn import functional as F

from bkn_core.data.batches import epoch_order, normalize
from bkn_core.engine.finite import BufferSnapshot
from bkn_core.engine.training import Training
from bkn_core.errors import DivergedError, InputError
from bkn_core.layers.batch_kalman import BatchKalmanNorm


def steps_of(run: Training, epoch: int = 0) -> list[list[int]]:
    """The images of each pass, by step."""
    return [[len(part.labels) for part in passes] for passes in run.epoch(epoch)]


def first_step(run: Training) -> Any:
    return next(iter(run.epoch(0)))


def gradients(run: Training) -> dict[str, Tensor]:
    """The gradients of a run's first step, as its optimizer sees them."""
    found: dict[str, Tensor] = {}

    def remember(*_: Any) -> None:
        found.update({name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None})

    run.optimizer.register_step_pre_hook(remember)
    run.take_step(0, first_step(run))
    return found


def facts(run: Training) -> dict[str, Any]:
    """All that a refused step must leave as it was."""
    return copy.deepcopy({"model": dict(run.model.state_dict()), "optimizer": run.optimizer.state_dict()})


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_an_epoch_uses_every_image_once_and_ends_in_a_smaller_step() -> None:
    run = training()
    assert steps_of(run) == [[8, 8], [8, 8], [4]]
    assert (run.epoch_steps, run.steps) == (EPOCH_STEPS, STEPS)
    seen = torch.cat([part.images for passes in run.epoch(0) for part in passes])
    expected = run.splits.train.batch(epoch_order(36, 0, 0))[0]
    assert torch.equal(seen, expected) and not torch.equal(expected, run.splits.train.batch(epoch_order(36, 0, 1))[0])


@pytest.mark.parametrize(("images", "expected"), [(33, [[8, 8], [8, 8], [1]]), (8, [[8]]), (3, [[3]])])
@pytest.mark.parametrize("kind", ["bkn", "bn"])
def test_odd_numbers_of_images_train(kind: str, images: int, expected: list[list[int]]) -> None:
    run = training(f"norm.kind={kind}", f"data.train_images={images}", "data.image_size=16")
    assert steps_of(run) == expected
    for passes in run.epoch(0):
        assert run.take_step(0, passes).loss.isfinite()
    assert run.images == images


def test_a_step_takes_the_gradient_of_the_mean_over_all_its_passes() -> None:
    run = training("norm.kind=gn")
    net = copy.deepcopy(run.model)
    passes = first_step(run)
    total = sum(
        F.cross_entropy(net(normalize(part.images, run.splits.preprocess)), part.labels, reduction="sum") / 16
        for part in passes
    )
    total.backward()
    assert_close(gradients(run), {name: p.grad for name, p in net.named_parameters()})


@pytest.mark.parametrize(("kind", "size"), [("bkn", 2), ("bkn", 4), ("bn", 2)])
def test_small_passes_have_the_gradient_of_one_large_pass(kind: str, size: int) -> None:
    """The groups are the same, so only the order of additions differs; an innovation would move between passes."""
    words = [f"norm.kind={kind}", "batch.statistics=2", "norm.innovation=false"]
    small, large = (training(*words, f"batch.per_device={n}") for n in (size, 16))
    assert len(first_step(small)) == 16 // size and len(first_step(large)) == 1
    assert_close(gradients(small), gradients(large))


def test_the_smaller_last_step_averages_over_its_own_images() -> None:
    run, whole = training("data.train_images=20", "norm.kind=gn"), training("data.train_images=20", "norm.kind=gn")
    whole.step = 1
    last = list(run.epoch(0))[-1]
    assert [len(part.labels) for part in last] == [4] and [len(part.labels) for part in first_step(whole)] == [4]
    net = copy.deepcopy(run.model)
    inputs = normalize(last[0].images, run.splits.preprocess)
    expected = F.cross_entropy(net(inputs), last[0].labels)
    torch.testing.assert_close(run.take_step(0, last).loss, expected.detach())


def test_gradients_are_clipped_to_the_norm() -> None:
    found = gradients(training("train.clip_norm=0.01"))
    assert torch.stack([g.square().sum() for g in found.values()]).sum().sqrt().item() == pytest.approx(0.01, rel=1e-4)
    unclipped = gradients(training())
    scale = found["head.bias"] / unclipped["head.bias"]
    torch.testing.assert_close(scale, scale.mean().expand(10))


def test_the_average_follows_the_weights_and_copies_the_statistics() -> None:
    run = training("train.ema=0.75")
    expected: dict[str, Tensor] = {}
    for passes in run.epoch(0):
        run.take_step(0, passes)
        for name, p in run.model.named_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * p.detach() if name in expected else p.detach().clone()
    assert_close(dict(run.evaluated.named_parameters()), expected)
    assert_same_bits(dict(run.evaluated.named_buffers()), dict(run.model.named_buffers()))
    assert run.evaluated is not run.model


@pytest.mark.parametrize("words", [[], ["train.ema=0.9", "data.augment=crop_flip", "train.deterministic=true"]])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(words: list[str]) -> None:
    runs = [training(*words, f"train.seed={seed}") for seed in (1, 1, 2)]
    for run in runs:
        torch.manual_seed(id(run) % 1000)  # what else draws in the process does not count
        for passes in run.epoch(0):
            run.take_step(0, passes)
    first, second, other = (run.model.state_dict() for run in runs)
    assert_same_bits(dict(first), dict(second))
    assert not torch.equal(first["head.weight"], other["head.weight"])


def poison_parameter(run: Training) -> None:
    with torch.no_grad():
        run.model.get_parameter("features.6.weight")[3, 2, 1, 0] = torch.nan


def poison_correction(run: Training) -> None:
    with torch.no_grad():
        run.model.get_parameter("features.7.prior_offset")[0] = torch.inf


def poison_output(run: Training) -> None:
    run.model.get_submodule("features.6").register_forward_hook(lambda _, __, y: y / 0)


def poison_one_pass(run: Training) -> None:
    """Only the first of two passes."""
    first = first_step(run)[0].images
    inputs = normalize(first, run.splits.preprocess, memory_format=torch.channels_last)

    def hook(_: nn.Module, given: tuple[Tensor], y: Tensor) -> Tensor:
        return y * torch.inf if torch.equal(given[0], inputs) else y

    run.model.get_submodule("features.0").register_forward_hook(hook)


def poison_loss(run: Training) -> None:
    """Finite logits too far apart for a finite loss."""
    run.model.get_submodule("head").register_forward_hook(lambda _, __, y: torch.where(y > 0, 3e38, -3e38) + 0 * y)


def poison_gradient(run: Training) -> None:
    run.model.get_parameter("features.6.weight").register_hook(lambda gradient: gradient * torch.nan)


def poison_statistics(run: Training) -> None:
    """Activations whose variance is beyond float32: they normalize to zeros, and the loss stays finite."""
    run.model.get_submodule("features.6").register_forward_hook(lambda _, __, y: y * 1e30)


POISONS: dict[str, Callable[[Training], None]] = {
    "parameter features.6.weight": poison_parameter,
    "parameter features.7.prior_offset": poison_correction,
    "output of layer features.6": poison_output,
    "output of layer features.0": poison_one_pass,
    "loss": poison_loss,
    "gradient of features.6.weight": poison_gradient,
}


@pytest.mark.parametrize("where", POISONS)
@pytest.mark.parametrize("words", [[], ["train.ema=0.9", "norm.innovation=true"]], ids=str)
def test_what_is_not_finite_stops_the_run_named_with_its_step(words: list[str], where: str) -> None:
    run = training(*words, "norm.correction=true")
    run.take_step(0, first_step(run))
    run.step = 0
    POISONS[where](run)
    before = facts(run)
    with pytest.raises(DivergedError) as caught:
        run.take_step(0, first_step(run))
    assert caught.value.message == f"step 1 (epoch 1): the {where} is not finite"
    assert caught.value.exit_code == 6
    assert_same_bits(facts(run)["model"], before["model"])


@pytest.mark.parametrize("words", [[], ["norm.kind=bn"]], ids=str)
def test_moving_statistics_that_overflow_are_noticed_and_undone(words: list[str]) -> None:
    run = training(*words)
    poison_statistics(run)
    before = facts(run)
    with pytest.raises(DivergedError, match="step 1"):
        run.take_step(0, first_step(run))
    assert_same_bits(facts(run)["model"], before["model"])


def test_a_layer_that_no_image_reaches_is_no_divergence() -> None:
    run = training()
    run.model.aside = BatchKalmanNorm(3)
    run.snapshot = BufferSnapshot(run.model)
    assert run.take_step(0, first_step(run)).skipped == ""


def test_an_update_that_overflows_is_noticed_before_anything_is_measured_or_saved() -> None:
    run = training("optim.lr=1e38", "optim.schedule=constant", "optim.warmup=0.0")
    run.model.get_parameter("head.weight").register_hook(lambda gradient: torch.full_like(gradient, 10))
    run.take_step(0, first_step(run))
    for use in (lambda: run.measure(run.splits.test, lambda: None), run.state):
        with pytest.raises(DivergedError, match=r"step 1: the parameter \S+ is not finite after"):
            use()


def test_a_skipped_step_changes_nothing_and_the_next_is_taken() -> None:
    run = training("train.nonfinite=skip")
    steps = list(run.epoch(0))
    run.take_step(0, steps[0])
    before = facts(run)
    hook = run.model.get_submodule("features.6").register_forward_hook(lambda _, __, y: y / 0)
    skipped = run.take_step(0, steps[1])
    assert skipped.skipped == "step 2 (epoch 1): the output of layer features.6 is not finite; the step is skipped"
    hook.remove()
    changed = {name for name, t in run.model.state_dict().items() if not torch.equal(t, before["model"][name])}
    assert not {name.rsplit(".")[-1] for name in changed} - {"gain_factor"}, "the schedule goes on, nothing else"
    assert (run.step, run.skipped) == (2, 1)
    assert run.take_step(0, steps[2]).skipped == "" and run.skipped == 0


def test_too_many_skipped_steps_in_a_row_end_the_run() -> None:
    run = training("train.nonfinite=skip", "train.epochs=11", "data.train_images=4")
    poison_output(run)
    passes = first_step(run)
    for _ in range(10):
        assert run.take_step(0, passes).skipped
    with pytest.raises(DivergedError, match="step 11"):
        run.take_step(0, passes)


@pytest.mark.parametrize("save", [Training.state, lambda run: run.measure(run.splits.test, lambda: None)])
def test_an_average_that_is_not_finite_is_neither_saved_nor_measured(save: Callable[[Training], Any]) -> None:
    run = training("train.ema=0.9")
    run.take_step(0, first_step(run))
    with torch.no_grad():
        run.evaluated.get_parameter("features.0.weight")[0] = torch.nan
    with pytest.raises(DivergedError, match=r"step 1: the averaged parameter features\.0\.weight is not finite"):
        save(run)


def test_a_state_of_another_recipe_is_refused() -> None:
    state = training("train.ema=0.9").state()
    for words in (["model.name=cifar_resnet8"], ["norm.kind=gn"], ["norm.learn_gain=false"]):
        with pytest.raises(InputError, match="does not fit"):
            training(*words).restore(copy.deepcopy(state))
    with pytest.raises(InputError, match="does not fit"):
        training("train.ema=0.9").restore({**state, "average": training().state()["average"]})


def test_a_state_survives_and_is_not_changed_by_going_on() -> None:
    run = training("train.ema=0.9", "norm.innovation=true")
    steps = list(run.epoch(0))
    run.take_step(0, steps[0])
    state = copy.deepcopy(run.state())
    other = Training(tiny("train.ema=0.9", "norm.innovation=true"), run.world)
    other.restore(copy.deepcopy(state))
    assert_same_bits(other.state(), state)
    for one in (run, other):
        one.take_step(0, steps[1])
    assert_same_bits(other.state(), run.state())
