"""A layer with a prior given by hand does in one call of C++ what it does in Python."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bkn_core.norm import alone, compiled_node, layers
from bkn_core.norm.kalman import Gaussian
from bkn_core.norm.layers import BatchKalmanNorm2d


@pytest.fixture(autouse=True)
def _compiled(in_cpp: bool) -> None:
    if not in_cpp:
        pytest.skip("no C++ compiler")


def prior() -> Gaussian:
    generator = torch.Generator().manual_seed(5)
    return Gaussian(torch.randn(6, generator=generator), torch.rand(6, generator=generator) + 0.5)


def layer(**options: Any) -> BatchKalmanNorm2d:
    made = BatchKalmanNorm2d(6, statistics_batch_size=2, gain=0.3, **{"innovation": True, **options})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6)))
    return made


def trained(made: BatchKalmanNorm2d, given: Gaussian, *, steps: int = 3) -> list[Tensor]:
    """Results, gradients and state after some steps."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(steps):
        x = (2 * torch.randn(4, 6, 5, 5, generator=generator) + 1).requires_grad_()
        y = made(x, given)
        (y * torch.randn(y.shape, generator=generator)).sum().backward()
        found += [y.detach(), x.grad]
    return [*found, *(p.grad for p in made.parameters()), *made.buffers()]


@pytest.mark.parametrize("affine", [{}, {"affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("size", [None, 4, 2, 1])
def test_it_does_what_python_does(affine: dict[str, Any], size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    made, served = layer(**affine), []
    made.statistics_batch_size = size
    other = copy.deepcopy(made)
    monkeypatch.setattr(layers, "filter_alone", lambda *a: served.append(alone.filter_alone(*a)) or served[-1])
    results = trained(made, prior())
    assert len(served) == 3 and None not in served
    monkeypatch.setattr(compiled_node, "node", lambda: None)
    for actual, expected in zip(results, trained(other, prior()), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)


OTHERS: list[dict[str, Any]] = [
    {"correction": True},
    {"innovation": False},
    {"track_running_stats": False},
    {"momentum": None},
    {"learn_gain": False},
    {"covariance": "full"},
    {"guarded": True},
    {"dtype": torch.float64},
]


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_other_layers_are_left_to_python(options: dict[str, Any]) -> None:
    made = layer(**options)
    kind = options.get("dtype", torch.float32)
    given = Gaussian(*(part.to(kind) for part in prior()))
    assert alone.filter_alone(made, torch.randn(4, 6, 5, 5, dtype=kind), given) is None


def test_what_c_cannot_take_is_left_to_python() -> None:
    made, given, x = layer(), prior(), torch.randn(4, 6, 5, 5)
    before = copy.deepcopy(made.state_dict())
    learned = Gaussian(given.mean.requires_grad_(), given.variance)
    rows = Gaussian(*(part.detach().repeat(2, 1) for part in given))
    for images, values in (
        (x[:3], given),
        (x[:0], given),
        (x.double(), given),
        (x, learned),
        (x, rows),
        (x[:, :5], given),
    ):
        assert alone.filter_alone(made, images, values) is None
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_tensor_class_does_not_spread() -> None:
    class Own(Tensor):
        pass

    made, x = layer(), torch.randn(4, 6, 5, 5)
    assert type(made(x.as_subclass(Own), prior())) is Own
    assert type(made(x, prior())) is Tensor


def test_evaluation_moves_nothing() -> None:
    made = layer().eval()
    before = copy.deepcopy(made.state_dict())
    made(torch.randn(4, 6, 5, 5), prior())
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_a_checkpoint_computes_the_same_again() -> None:
    made, x = layer(), torch.randn(4, 6, 5, 5)
    other, results = copy.deepcopy(made), []
    for net, run in ((made, lambda f, v: f(v)), (other, lambda f, v: checkpoint(f, v, use_reentrant=False))):
        net.innovation_momentum = 0.5
        values = x.clone().requires_grad_()
        run(lambda v, net=net: net(v, prior()), values).sin().sum().backward()
        results.append((values.grad, net.innovation, net.running_mean))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)


def test_a_computed_weight_is_used() -> None:
    made = layer()
    other = copy.deepcopy(made)
    with torch.no_grad():
        other.weight.mul_(2)
    torch.nn.utils.parametrize.register_parametrization(made, "weight", Twice())
    x = torch.randn(4, 6, 5, 5)
    torch.testing.assert_close(made(x, prior()), other(x, prior()))


class Twice(torch.nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return twice the weight."""
        return 2 * weight
