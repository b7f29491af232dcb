"""The images and the loss that a recipe asks for, against torchvision and torch's formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import assert_same_bits, assert_same_run, tiny, train_in_parts, training
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from bkn_core.data.batches import generator_at, normalize
from bkn_core.engine.build import load_splits
from bkn_core.engine.loop import train
from bkn_core.engine.objective import class_weights, drawing_from, rand_augment
from bkn_core.engine.steps import Pass
from bkn_core.engine.training import Training
from bkn_core.errors import InputError, RecipeError
from bkn_core.recipe import load_recipe

LAYOUT = torch.contiguous_format
POSITION = (0, 0, 0)  # epoch, pass, process
EVERYTHING = (
    "data.augment=crop_flip",
    "data.rand_augment=9",
    "data.mixup=0.8",
    "data.cutmix=1.0",
    "train.label_smoothing=0.1",
    "train.class_weights=balanced",
)


def first_pass(run: Training) -> Pass:
    return next(iter(run.epoch(0)))[0]


def observed_step(run: Training) -> tuple[Tensor, Tensor, Tensor]:
    """The input and the logits of a run's only forward in its first step, and its loss."""
    seen: list[Tensor] = []
    handle = run.model.register_forward_hook(lambda _, words, logits: seen.extend((words[0], logits.detach())))
    step = run.take_step(0, [first_pass(run)])
    handle.remove()
    return seen[0], seen[1], step.loss


def as_torchvision_draws(transform: Callable[..., Any], *values: Tensor) -> Any:
    """Let torchvision draw from the process's generator, in the state of the pass's own."""
    torch.set_rng_state(generator_at(0, *POSITION).get_state())
    return transform(*values)


def reference(logits: Tensor, shares: Tensor, weights: Tensor, smoothing: float) -> float:
    """Weighted cross entropy of smoothed shares of the classes, a mean over images, in float64."""
    shares = shares.double() * (1 - smoothing) + smoothing / shares.shape[1]
    return float(-(weights.double() * shares * logits.double().log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_is_torchs_formula(smoothing: float) -> None:
    run = training(f"train.label_smoothing={smoothing}")
    labels = first_pass(run).labels
    _, logits, loss = observed_step(run)
    torch.testing.assert_close(loss, nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, labels))
    assert float(loss) == pytest.approx(reference(logits, F.one_hot(labels, 10), torch.ones(10), smoothing), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_weigh_the_loss_and_are_one_on_average(smoothing: float) -> None:
    given = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]
    run = training(f"train.class_weights={given}", f"train.label_smoothing={smoothing}")
    weights = torch.tensor(given) / np.mean([given[label] for label in run.splits.train.labels])
    labels = first_pass(run).labels
    _, logits, loss = observed_step(run)
    expected = F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing, reduction="sum") / len(labels)
    torch.testing.assert_close(loss, expected)
    expected_64 = reference(logits, F.one_hot(labels, 10), weights, smoothing)
    assert float(loss) == pytest.approx(expected_64, rel=1e-5)


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = torch.tensor([0] * 7 + [1] * 2 + [2] * 11)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    np.testing.assert_allclose(class_weights("balanced", labels, 3), expected, rtol=1e-6)


def test_balanced_weights_of_a_class_without_images_are_finite() -> None:
    weights = class_weights("balanced", torch.tensor([0, 0, 2]), 3)
    assert weights is not None and weights.isfinite().all()
    assert weights[torch.tensor([0, 0, 2])].mean() == pytest.approx(1)


@pytest.mark.parametrize(("key", "kind"), [("mixup", v2.MixUp), ("cutmix", v2.CutMix)])
def test_images_of_a_forward_are_mixed_as_torchvision_does(key: str, kind: Any) -> None:
    run = training(f"data.{key}=5.0")
    part = first_pass(run)
    inputs, logits, loss = observed_step(run)
    plain = normalize(part.images, run.splits.preprocess)
    expected, shares = as_torchvision_draws(kind(alpha=5.0, num_classes=10), plain, part.labels)
    assert torch.equal(inputs, expected) and not torch.equal(inputs, plain)
    assert float(loss) == pytest.approx(reference(logits, shares, torch.ones(10), 0.0), rel=1e-5)


def test_with_both_each_forward_is_mixed_in_one_way() -> None:
    run = training("data.mixup=1.0", "data.cutmix=1.0")
    part = first_pass(run)
    plain = normalize(part.images, run.splits.preprocess)
    kinds = set()
    for position in range(20):
        inputs, _ = run.objective.inputs(part.images, part.labels, generator_at(0, position), LAYOUT)
        # CutMix takes whole pixels from one image or the other; MixUp from both.
        is_cut = ((inputs == plain) | (inputs == plain.roll(1, 0))).all()
        kinds.add("cut" if is_cut else "mixed")
    assert kinds == {"cut", "mixed"}


def test_rand_augment_is_torchvisions_drawn_for_each_image() -> None:
    run = training("data.rand_augment=9")
    part = first_pass(run)
    inputs, _, _ = observed_step(run)
    changed = as_torchvision_draws(lambda: [v2.RandAugment(magnitude=9)(image) for image in part.images])
    assert torch.equal(inputs, normalize(torch.stack(changed), run.splits.preprocess))
    together = as_torchvision_draws(v2.RandAugment(magnitude=9), part.images)
    assert not torch.equal(torch.stack(changed), together)


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_of_the_highest_magnitude_keeps_shape_and_type(channels: int) -> None:
    images = torch.randint(0, 256, (60, channels, 9, 7), dtype=torch.uint8)
    changed = rand_augment(images, 30)
    assert changed.shape == images.shape and changed.dtype == torch.uint8 and not torch.equal(changed, images)


def test_drawing_from_a_generator_moves_it_and_leaves_the_process_alone() -> None:
    before, own, twin = torch.get_rng_state(), generator_at(3), generator_at(3)
    with drawing_from(own):
        drawn = torch.rand(5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.rand(5, generator=twin))
    assert torch.equal(torch.rand(5, generator=own), torch.rand(5, generator=twin))
    with pytest.raises(RuntimeError), drawing_from(own):
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_with_everything_drawn_resumes_to_the_same_bits(tmp_path: Path) -> None:
    recipe = tiny(*EVERYTHING, "eval.batch_size=40")
    train(recipe, out=tmp_path / "straight")
    train_in_parts(recipe, tmp_path / "parts", (2, 3))
    assert_same_run(tmp_path / "parts", tmp_path / "straight")


def test_a_state_of_before_these_keys_goes_on_where_they_are_not_asked_for() -> None:
    new = {"data": ("rand_augment", "mixup", "cutmix"), "train": ("label_smoothing", "class_weights")}
    run = training()
    state = run.state()
    for section, keys in new.items():
        for key in keys:
            del state["recipe"][section][key]
    other = training()
    other.restore(state)
    assert_same_bits(other.state(), run.state())
    with pytest.raises(InputError, match=r"train\.label_smoothing changed"):
        training("train.label_smoothing=0.1").restore(state)


def test_evaluation_knows_neither_weights_nor_smoothing() -> None:
    plain, other = training(), training(*EVERYTHING)
    one, two = (run.measure(run.splits.test, lambda: None)["population"] for run in (plain, other))
    assert torch.equal(one.losses, two.losses)


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_one_image_in_a_forward_has_none_to_be_mixed_with(key: str) -> None:
    words = ("batch.statistics=1", "batch.per_device=1", f"data.{key}=1.0")
    with pytest.raises(
        RecipeError, match=rf"data\.{key} is 1\.0, but a forward holds one image(.|\n)*batch.per_device"
    ):
        training(*words)
    with pytest.raises(RecipeError, match="a forward holds one image"):
        load_splits(tiny(*words))


def test_another_number_of_weights_than_classes_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"train.class_weights holds 2 numbers, but there are 10 classes\nGive one"):
        load_splits(tiny("train.class_weights=[1, 2]"))


@pytest.mark.parametrize(
    ("word", "allowed"),
    [
        ("train.label_smoothing=1", "a number of at least 0 and below 1"),
        ("train.label_smoothing=null", "a number of at least 0 and below 1"),
        ("train.class_weights=[0, 1]", "balanced, a list of one number from 0.000001 to 1000000 for each class"),
        ("train.class_weights=[]", "balanced, a list"),
        ("train.class_weights=even", "balanced, a list"),
        ("data.mixup=0", "a number from 0.01 to 100, or null"),
        ("data.cutmix=.inf", "a number from 0.01 to 100, or null"),
        ("data.rand_augment=31", "an integer from 0 to 30, or null"),
        ("data.rand_augment=true", "an integer from 0 to 30, or null"),
    ],
)
def test_values_that_cannot_be_are_refused_with_what_is_allowed(word: str, allowed: str) -> None:
    key = word.partition("=")[0]
    with pytest.raises(RecipeError, match=rf"{key} is .*; give {allowed}"):
        load_recipe(None, [word])
