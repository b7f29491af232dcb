"""Values that make float32 overflow, underflow or cancel."""

from __future__ import annotations

import pytest
import torch

from bkn_core.norm.fused import FilterSettings, kalman_normalize
from bkn_core.norm.kalman import Gaussian

pytestmark = pytest.mark.usefixtures("every_path")
HARD = {
    "far from zero": 1e4 + 1e-2 * torch.randn(4, 3, 5, 5),
    "constant": torch.full((4, 3, 5, 5), 7.0),
    "constant and far": torch.full((4, 3, 5, 5), 1e30),
    "zero": torch.zeros(4, 3, 5, 5),
    "subnormal": 1e-40 * torch.randn(4, 3, 5, 5),
    "huge": 1e30 * torch.randn(4, 3, 5, 5),
    "one value": torch.randn(4, 3, 1, 1),
}


@pytest.mark.parametrize("gain", [0.0, 0.1, 1.0, None])
@pytest.mark.parametrize("name", HARD)
def test_hard_values_give_no_nan(name: str, gain: float | None) -> None:
    x = HARD[name].clone().requires_grad_()
    size = 1 if name == "one value" else 2
    q = torch.tensor(0.0 if gain is None else gain)
    prior = None if gain is None else Gaussian(torch.zeros(3), torch.ones(3))
    y, statistics, *_ = kalman_normalize(x, prior, q, torch.ones(3), torch.zeros(3), FilterSettings(1e-5, size))
    assert not y.isnan().any() and not statistics.isnan().any()


@pytest.mark.parametrize("gain", [0.0, 0.1, 1.0, None])
@pytest.mark.parametrize("name", HARD)
def test_hard_values_give_no_nan_gradients(name: str, gain: float | None) -> None:
    x = HARD[name].clone().requires_grad_()
    size = 1 if name == "one value" else 2
    q = torch.tensor(0.0 if gain is None else gain, requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    leaves = [x, weight]
    prior = None
    if gain is not None:
        prior = Gaussian(torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True))
        leaves += [*prior, q]
    y, _, *_ = kalman_normalize(x, prior, q, weight, torch.zeros(3), FilterSettings(1e-5, size))
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    assert not any(g.isnan().any() for g in torch.autograd.grad(y, leaves, upstream))


def test_values_far_from_zero_lose_no_more_than_the_rounding_of_an_affine_map() -> None:
    x = 1e4 + 1e-2 * torch.randn(8, 3, 16, 16)
    exact = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    y, statistics, *_ = kalman_normalize(x, None, torch.tensor(1.0), None, None, FilterSettings(1e-5))
    largest = float((statistics[1] + 1e-5).rsqrt().max()) * 1.001e4
    assert (y - exact).abs().max() <= 1.5 * torch.finfo(torch.float32).eps * largest
