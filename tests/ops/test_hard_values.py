"""Values that make float32 overflow, underflow or cancel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bkn_core.filter.kalman import Gaussian
from bkn_core.ops.covariance import matrix_normalize
from bkn_core.ops.normalize import FilterSettings, kalman_normalize

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
    assert not y.isnan().any() and not statistics.packed.isnan().any()


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


FORMATS = [torch.contiguous_format, torch.channels_last]


def normalized(x: Tensor, prior: Gaussian, q: float, eps: float) -> Tensor:
    """y in float64 for groups of two images, by equation 7 of the paper."""
    values = x.double().unflatten(0, (-1, 2))
    mean, variance = values.mean((1, 3, 4)), values.var((1, 3, 4), unbiased=False)
    d = mean - prior.mean.double()
    spread = (1 - q) * prior.variance.double() + q * variance + q * (1 - q) * d.square() + eps
    rows = ((prior.mean + q * d), spread.sqrt())
    centre, deviation = (t[:, None, :, None, None] for t in rows)
    return ((values - centre) / deviation).flatten(0, 1)


@pytest.mark.parametrize("covariance", [False, True])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("gain", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("size", [1e15, 1e18, 5e18])
def test_large_values_are_normalized_as_in_float64(
    size: float, gain: float, layout: torch.memory_format, covariance: bool
) -> None:
    x = size * (torch.randn(4, 3, 90, 110) + torch.tensor([0, 1, 3])[:, None, None])  # two blocks of the kernels
    x = x.contiguous(memory_format=layout).requires_grad_()
    prior = Gaussian(*(torch.tensor(values).requires_grad_() for values in ([0.0, 1.0, size], [1.0, 1.0, 4.0])))
    q = torch.tensor(gain, requires_grad=True)
    form = matrix_normalize if covariance else kalman_normalize
    y, statistics, *_ = form(x, prior, q, None, None, FilterSettings(1e-5, 2))
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(y, (x, *prior, q), upstream)
    wide = x.detach().double().requires_grad_()
    exact = normalized(wide, Gaussian(*(t.detach() for t in prior)), gain, 1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    assert statistics.packed.isfinite().all() and all(g.isfinite().all() for g in gradients)
    (wanted,) = torch.autograd.grad(exact, wide, upstream.double())
    torch.testing.assert_close(gradients[0].double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_values_far_from_zero_lose_no_more_than_the_rounding_of_an_affine_map() -> None:
    x = 1e4 + 1e-2 * torch.randn(8, 3, 16, 16)
    exact = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    y, statistics, *_ = kalman_normalize(x, None, torch.tensor(1.0), None, None, FilterSettings(1e-5))
    largest = float((statistics.variance + 1e-5).rsqrt().max()) * 1.001e4
    assert (y - exact).abs().max() <= 1.5 * torch.finfo(torch.float32).eps * largest
