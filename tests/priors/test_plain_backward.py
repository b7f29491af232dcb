"""Gradients of priors in a loop of one's own: added in place when a backward pass is over, unless somebody looks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bkn_core as bkn
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.ops import extension

WEIGHT = "3.weight"
Seen = list[Tensor]


@pytest.fixture(autouse=True)
def _compiled(in_cpp: bool) -> None:
    if not in_cpp:
        pytest.skip("no C++ compiler")


def images() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def converted() -> nn.Module:
    layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4), nn.ReLU()]
    return still(bkn.convert(nn.Sequential(*layers), images(), statistics_batch_size=2).train())


def still(model: nn.Module) -> nn.Module:
    """Keep what layers remember from moving."""
    for layer in model.modules():
        if isinstance(layer, BatchKalmanNorm):
            layer.on_posterior = lambda *_: None
    return model


def twin(model: nn.Module) -> nn.Module:
    return still(copy.deepcopy(model))


def loss(model: nn.Module, x: Tensor | None = None) -> Tensor:
    return model(images() if x is None else x).square().sin().sum()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture
def expected(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module, int], dict[str, Tensor | None]]:
    """Return how to have the gradients of several passes from the nodes in Python."""

    def of_python(model: nn.Module, passes: int = 1) -> dict[str, Tensor | None]:
        with monkeypatch.context() as patch:
            patch.setattr(extension, "operations", lambda: None)
            for _ in range(passes):
                loss(model).backward()
        return gradients(model)

    return of_python


def assert_equal(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], *, exactly: bool = True) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        other = actual[name]
        assert (other is None) == (gradient is None), name
        if other is not None:  # the sum of several passes is rounded in another order
            torch.testing.assert_close(other, gradient, **({"rtol": 0.0, "atol": 0.0} if exactly else {}), msg=name)


@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_are_those_of_the_node_in_python(passes: int, expected: Any) -> None:
    model = converted()
    other = twin(model)
    for _ in range(passes):
        loss(model).backward()
    assert_equal(gradients(model), expected(other, passes), exactly=passes == 1)


def test_tied_weights_gather_both_gradients(expected: Any) -> None:
    model = converted()
    model[1].prior_offset = model[1].bias  # of which one has a gradient beside that of the priors
    model[4].prior_log_scale = model[4].prior_offset
    other = twin(model)
    loss(model).backward()
    assert_equal(gradients(model), expected(other), exactly=False)


class Names(TorchDispatchMode):
    """The operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_is_added_up_beside_the_kernels() -> None:
    value = loss(converted())
    with Names() as names:
        value.backward()
    assert "convolution_backward" in names.found and not {"add", "add_"} & set(names.found)


def by_hook(model: nn.Module, seen: Seen) -> None:
    model.get_parameter(WEIGHT).register_hook(lambda gradient: seen.append(gradient.clone()))


def by_late_hook(model: nn.Module, seen: Seen) -> None:
    model.get_parameter(WEIGHT).register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))


def by_hook_of_the_node(model: nn.Module, seen: Seen) -> Iterator[object]:
    node = model.get_parameter(WEIGHT).view(-1).grad_fn.next_functions[0][0]
    node.register_prehook(lambda found: seen.append(found[0].clone()))
    yield node  # which lives as long as somebody holds it


@pytest.mark.parametrize("watch", [by_hook, by_late_hook, by_hook_of_the_node])
def test_whoever_watches_a_gradient_sees_all_of_it(watch: Callable[[nn.Module, Seen], Any], expected: Any) -> None:
    model, seen = converted(), Seen()
    other = twin(model)
    kept = list(watch(model, seen) or ())
    loss(model).backward()
    del kept
    assert len(seen) == 1 and torch.equal(seen[0], expected(other)[WEIGHT])


@pytest.mark.parametrize("all_of_it", [False, True])
def test_gradients_that_are_asked_for_are_whole(all_of_it: bool, expected: Any) -> None:
    model = converted()
    known = expected(twin(model))
    asked = list(model.parameters()) if all_of_it else [model.get_parameter(WEIGHT)]
    found = torch.autograd.grad(loss(model), asked)
    assert all(parameter.grad is None for parameter in model.parameters())
    loss(model).backward(inputs=asked)
    for parameter, gradient in zip(asked, found, strict=True):
        assert torch.equal(gradient, parameter.grad)
    assert torch.equal(model.get_parameter(WEIGHT).grad, known[WEIGHT])
    assert sum(parameter.grad is not None for parameter in model.parameters()) == len(asked)


def test_a_weight_that_moves_before_the_pass_is_over_is_refused() -> None:
    model, leaf = converted(), torch.ones(()).requires_grad_()

    @torch.no_grad()
    def move(_: Tensor) -> None:
        model.get_parameter(WEIGHT).mul_(2)

    leaf.register_post_accumulate_grad_hook(move)
    with pytest.raises(RuntimeError, match="step the optimizer behind backward"):
        loss(model, leaf * images()).backward()


def test_a_gradient_of_gradients_is_refused() -> None:
    model = converted()
    found = torch.autograd.grad(loss(model), [model.get_parameter(WEIGHT)], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        found[0].sum().backward()
