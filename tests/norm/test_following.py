"""A posterior whose variance follows, to a share, that of all groups: the fused node against the plain functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bkn_core.norm.fused import FilterSettings, kalman_normalize
from bkn_core.norm.kalman import Gaussian, follow, moments, normalize, spread_over_images, update

pytestmark = pytest.mark.usefixtures("both_paths")
EPS = 1e-3


def leaves(*, grouped: bool, dtype: torch.dtype, last: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = (3, 5) if grouped else (5,)
    x = 2 * draw(6, 5, 4, 3) + 1
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    values = [x, draw(*rows), draw(*rows).square() + 0.3, torch.tensor(0.2).double(), draw(5), draw(5)]
    return [value.to(dtype).requires_grad_() for value in values]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_gradients_are_those_of_the_plain_functions(share: float, grouped: bool, last: bool) -> None:
    narrow, wide = (leaves(grouped=grouped, dtype=dtype, last=last) for dtype in (torch.float32, torch.float64))
    upstream = torch.randn(6, 5, 4, 3, dtype=torch.float64)
    x, mean, variance, gain, weight, bias = wide
    observed = moments(x, 2)
    seen = Gaussian(observed.mean, observed.variance)
    posterior = follow(update(Gaussian(mean, variance), observed, gain), seen, share, EPS)
    rows = Gaussian(*(spread_over_images(values, 6, 2) for values in posterior))
    expected = normalize(x, rows, weight, bias, EPS)
    exact = torch.autograd.grad((expected * upstream).sum() + posterior.variance.sum(), wide)
    for values in (wide, narrow):
        x, mean, variance, gain, weight, bias = values
        settings = FilterSettings(EPS, 2, share=share)
        filtered = kalman_normalize(x, Gaussian(mean, variance), gain, weight, bias, settings)
        torch.testing.assert_close(filtered.y.double(), expected, rtol=1e-5, atol=1e-5)
        objective = (filtered.y * upstream.to(x.dtype)).sum() + filtered.posterior.variance.sum()
        for actual, wanted in zip(torch.autograd.grad(objective, values), exact, strict=True):
            torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-4)


def test_with_the_whole_share_the_loss_does_not_feel_the_scale_of_what_is_observed() -> None:
    """As under batch normalization: ∂L/∂x has no part along x - µ' if the prior is right (gain 0, ε 0)."""
    x = torch.randn(8, 3, 5, 5, dtype=torch.float64)
    x = (x - x.mean((0, 2, 3), keepdim=True)).requires_grad_()
    prior, zero = Gaussian(torch.zeros(3).double(), x.detach().var((0, 2, 3))), torch.tensor(0.0).double()
    settings = FilterSettings(0.0, 2, share=1.0)
    y = kalman_normalize(x, prior, zero, None, None, settings).y
    (gradient,) = torch.autograd.grad(y.pow(3).sum() + y.exp().sum(), x)
    along = (gradient * x.detach()).sum((0, 2, 3))
    torch.testing.assert_close(along, torch.zeros(3).double(), rtol=0, atol=1e-9)
