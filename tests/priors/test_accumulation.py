"""One optimizer step of several forwards with priors computed once: the same gradients as with priors for each."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bkn_core as bkn
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.ops import extension, kernels
from bkn_core.priors.hooks import PriorHooks

LABELS = torch.tensor([0, 1, 2, 3])


class Net(nn.Module):
    """Two blocks behind a stem, the second maybe under a checkpoint."""

    def __init__(self, reentrant: bool | None = None, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), act(), nn.Conv2d(6, 4, 1))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.stem(x)
        y = self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.norm(y).mean((2, 3))


def parts(count: int = 3) -> list[Tensor]:
    return list(torch.randn(count, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).unbind())


def converted(reentrant: bool | None = None, act: type[nn.Module] = nn.ReLU, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return bkn.convert(Net(reentrant, act), parts()[0], statistics_batch_size=2, **options).train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def accumulate(model: nn.Module) -> dict[str, Tensor]:
    for x in parts():
        (F.cross_entropy(model(x), LABELS) / 3).backward()
    return gradients(model)


def held_still(model: nn.Module) -> nn.Module:
    """Keep what layers remember from moving, which without the block acts on the next forward at once."""
    for layer in model.modules():
        if isinstance(layer, BatchKalmanNorm):
            layer.on_posterior = lambda *_: None
    return model


def twin(model: nn.Module) -> nn.Module:
    """A copy, held still where the model is."""
    is_still = any(layer.on_posterior is not None for layer in kalman_layers(model))
    return held_still(copy.deepcopy(model)) if is_still else copy.deepcopy(model)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("act", [nn.ReLU, nn.Softplus])  # the kernels know the first only
def test_gradients_are_those_of_separate_priors(act: type[nn.Module], reentrant: bool | None) -> None:
    model = held_still(converted(reentrant, act=act))
    other = twin(model)
    with bkn.accumulation(model):
        accumulate(model)
    assert_same(gradients(model), accumulate(other))


def test_the_priors_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = converted(), []
    original = PriorHooks.programs if kernels.library() else PriorHooks.predictions
    monkeypatch.setattr(PriorHooks, original.__name__, lambda *a: calls.append(1) or original(*a))
    with bkn.accumulation(model):
        accumulate(model)
    assert len(calls) == 1
    accumulate(model)
    assert len(calls) == 4


@pytest.mark.parametrize("options", [{"message": "raw"}, {"transition": "learned"}], ids=str)
def test_priors_of_activations_are_left_alone(options: dict[str, Any]) -> None:
    model = held_still(converted(**options))
    other = twin(model)
    with bkn.accumulation(model):
        accumulate(model)
    assert_same(gradients(model), accumulate(other))


def test_what_layers_remember_is_that_of_one_forward_of_all_images() -> None:
    model = converted()
    other = twin(model)
    with torch.no_grad(), bkn.accumulation(model):
        outputs = [model(x) for x in parts()]
        assert not any(layer.uncertainty.any() for layer in kalman_layers(model))
    with torch.no_grad():
        expected = other(torch.cat(parts()))
    torch.testing.assert_close(torch.cat(outputs), expected)
    for layer, same in zip(kalman_layers(model), kalman_layers(other), strict=True):
        assert layer.uncertainty[0] == 1
        for name, buffer in same.named_buffers():
            torch.testing.assert_close(getattr(layer, name), buffer, msg=name)


def kalman_layers(model: nn.Module) -> list[BatchKalmanNorm]:
    layers = (module for module in model.modules() if isinstance(module, BatchKalmanNorm))
    return [layer for layer in layers if layer.innovation is not None]


def test_nothing_is_left_behind_by_an_error() -> None:
    model = converted()
    other = twin(model)
    with pytest.raises(KeyError), bkn.accumulation(model):
        raise KeyError
    assert all(p.grad is None for p in model.parameters())
    assert_same(accumulate(model), accumulate(other))


def test_an_optimizer_that_steps_inside_is_refused() -> None:
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(bkn.BknError, match="outside the block"), bkn.accumulation(model):
        accumulate(model)
        optimizer.step()


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(bkn.BknError, match="not converted"), bkn.accumulation(Net()):
        pass


def test_a_block_inside_a_block_changes_nothing() -> None:
    model = held_still(converted())
    other = twin(model)
    with bkn.accumulation(model), bkn.accumulation(model):
        accumulate(model)
    assert_same(gradients(model), accumulate(other))


def watched(model: nn.Module) -> None:
    model.block[0].weight.register_hook(lambda gradient: None)


def tied(model: nn.Module) -> None:
    model.norm.weight = nn.Parameter(model.norm.weight.detach().clone())
    model.block[3].bias = model.norm.bias


def frozen(model: nn.Module) -> None:
    model.block[0].weight.requires_grad_(False)


def laid_out_otherwise(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("change", [watched, tied, frozen, laid_out_otherwise])
@pytest.mark.parametrize("before", [False, True])
def test_gradients_that_are_there_are_added_to(change: Callable[[nn.Module], None], before: bool) -> None:
    model = held_still(converted())
    change(model)
    other = twin(model)
    if before:
        for net in (model, other):
            for parameter in net.parameters():
                parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    with bkn.accumulation(model):
        accumulate(model)
    assert_same(gradients(model), accumulate(other))


@pytest.mark.filterwarnings("ignore:.*grad and param do not obey the gradient layout contract")
@pytest.mark.parametrize("change", [frozen, laid_out_otherwise, nn.Module.train])
@pytest.mark.parametrize("before", [False, True])
def test_in_cpp_gradients_are_those_of_python(
    change: Callable[[nn.Module], None], before: bool, in_cpp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_cpp:
        pytest.skip("no C++ compiler")
    model = converted()
    change(model)
    other = twin(model)
    found = []
    for net in (model, other):
        for parameter in net.parameters() if before else ():
            parameter.grad = torch.ones_like(parameter, memory_format=torch.contiguous_format)
        with bkn.accumulation(net):
            accumulate(net)
        found.append(gradients(net))
        monkeypatch.setattr(extension, "operations", lambda: None)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]) and gradient.stride() == found[1][name].stride(), name


def test_a_hook_sees_the_gradient_of_the_priors() -> None:
    model, seen = held_still(converted()), []
    model.block[0].weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    with bkn.accumulation(model):
        expected = accumulate(model)
    assert len(seen) == 4 and not torch.equal(seen[-1], expected["block.0.weight"])
    assert torch.equal(seen[-1], gradients(model)["block.0.weight"])


def test_a_late_backward_pass_is_refused() -> None:
    model = converted()
    with bkn.accumulation(model):
        loss = F.cross_entropy(model(parts()[0]), LABELS)
    with pytest.raises(bkn.BknError, match="inside the block"):
        loss.backward()


def test_a_schedule_that_steps_inside_is_refused() -> None:
    model = converted()
    with pytest.raises(bkn.BknError, match="outside the block"), bkn.accumulation(model):
        accumulate(model)
        bkn.anneal_gain_(model, 0.5)


def test_a_copy_made_inside_is_outside() -> None:
    model = held_still(converted())
    with bkn.accumulation(model):
        copies = twin(model), pickle.loads(pickle.dumps(model))
        accumulate(model)
    for other in copies:
        assert_same(accumulate(held_still(other)), gradients(model))


def test_gradients_in_a_block_that_began_without_are_whole() -> None:
    model = held_still(converted())
    other = twin(model)
    with torch.no_grad(), bkn.accumulation(model), torch.enable_grad():
        accumulate(model)
    assert_same(gradients(model), accumulate(other))


def test_other_parameters_have_priors_of_their_own() -> None:
    model = held_still(converted())
    others = {name: 1.5 * p.detach() for name, p in model.named_parameters()}
    expected = torch.func.functional_call(model, others, parts()[0])
    with bkn.accumulation(model):
        torch.testing.assert_close(torch.func.functional_call(model, others, parts()[0]), expected)


def test_every_converted_part_is_served() -> None:
    torch.manual_seed(0)
    images = parts()[0]
    both = nn.ModuleList(bkn.convert(Net(), images, statistics_batch_size=2).train() for _ in range(2))
    held_still(both)
    other = held_still(copy.deepcopy(both))
    with bkn.accumulation(both):
        for net in both:
            accumulate(net)
    for net in other:
        accumulate(net)
    assert_same(gradients(both), gradients(other))


def test_nothing_holds_itself() -> None:
    gc.collect()
    gc.disable()
    try:
        model = converted()
        with bkn.accumulation(model):
            accumulate(model)
        alive = [weakref.ref(model.norm), weakref.ref(model)]
        del model
        assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()


def test_distributed_models_are_refused(process_group: None) -> None:
    wrapped = nn.parallel.DistributedDataParallel(converted())
    for model in (wrapped, nn.Sequential(wrapped)):
        with pytest.raises(bkn.BknError, match="no_sync"), bkn.accumulation(model):
            pass
