"""A layer's gradient has no derivative: whoever asks for one is told, on every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bkn_core.filter.kalman import Gaussian
from bkn_core.ops.normalize import FilterSettings, kalman_normalize

pytestmark = pytest.mark.usefixtures("every_path")


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)


def normalized(x: Tensor, weight: Tensor) -> Tensor:
    prior = Gaussian(torch.zeros_like(weight), torch.ones_like(weight))
    return kalman_normalize(x, prior, weight.new_tensor(0.3), weight, None, FilterSettings(1e-2, None)).y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [1, 3])  # what arrives is a constant, or has a derivative
def test_gradients_of_gradients_are_refused(power: int, dtype: torch.dtype) -> None:
    x, weight = drawn(3, 2, 2, dtype=dtype).requires_grad_(), drawn(2, dtype=dtype).requires_grad_()
    loss = normalized(x.tanh(), weight).pow(power).sum()
    for slope in torch.autograd.grad(loss, (x, weight), create_graph=True):
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(slope.square().sum(), x, retain_graph=True)


def test_a_gradient_that_is_kept_for_more_is_the_gradient() -> None:
    x, weight = drawn(4, 3, 5, dtype=torch.float64).requires_grad_(), drawn(3, dtype=torch.float64)
    loss = normalized(x, weight).square().sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, x, create_graph=True)[0].detach(), expected)


def test_gradients_of_gradients_of_transforms_are_refused() -> None:
    weight = drawn(2, dtype=torch.float64)

    def slope(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: normalized(x.tanh(), weight).sum())(x).square().sum()

    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.func.grad(slope)(drawn(3, 2, 2, dtype=torch.float64))
