"""Moving Average Batch Normalization against its formula, group after group in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bkn_core.layers.rivals.moving_average import MovingAverageNorm


class Loop:
    """One group at a time: forward, then backward."""

    def __init__(self, layer: MovingAverageNorm) -> None:
        self.gamma, self.beta = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        self.squares: list[Any] = []
        self.gradients: list[Any] = []
        self.v, self.t = layer.running_var.numpy().copy(), int(layer.num_batches_tracked)
        self.m, self.length, self.eps = len(layer.square_past), layer.length, layer.eps

    def __call__(self, x: Any, dy: Any) -> tuple[Any, ...]:
        self.t += 1
        own = self.t <= self.m or self.t < self.length / 200
        self.squares = [*self.squares, np.einsum("nchw->c", x**2) / (x.size / x.shape[1])][-self.m :]
        variance = self.squares[-1] if own else np.mean(self.squares, axis=0)
        r = np.clip(np.sqrt(variance + self.eps) / np.sqrt(self.v + self.eps), 1 / 5, 5)
        r = np.ones_like(r) if self.t <= self.length / 20 else r
        self.v = 0.98 * self.v + 0.02 * variance
        column = lambda row: row[None, :, None, None]  # noqa: E731
        z = x / column(np.sqrt(variance + self.eps))
        y = column(self.gamma * r) * z + column(self.beta)
        g = column(self.gamma * r) * dy
        self.gradients = [*self.gradients, np.einsum("nchw->c", g * z) / (x.size / x.shape[1])][-self.m :]
        psi = self.gradients[-1] if own else np.mean(self.gradients, axis=0)
        dx = (g - z * column(psi)) / column(np.sqrt(variance + self.eps))
        return y, dx, np.einsum("nchw->c", dy * column(r) * z), np.einsum("nchw->c", dy)


def drawn_layer(size: int | None, length: int) -> MovingAverageNorm:
    layer = MovingAverageNorm(3, statistics_batch_size=size).double().train()
    torch.nn.init.normal_(layer.weight), torch.nn.init.normal_(layer.bias)
    layer.length = length
    return layer


def step(layer: MovingAverageNorm, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("length", [1, 100, 2000, 20_000])
@pytest.mark.parametrize("size", [2, 8, None])
def test_steps_equal_the_formula_group_by_group(size: int | None, length: int) -> None:
    layer = drawn_layer(size, length)
    loop = Loop(layer)
    for scale in (1.0, 3.0, 0.1, 20.0, 1.0, 1.0):
        x, dy = torch.randn(2, 8, 3, 4, 5, dtype=torch.float64).unbind()
        found = step(layer, scale * x + 0.3, dy)
        groups = zip((scale * x + 0.3).split(size or 8), dy.split(size or 8), strict=True)
        parts = [loop(a.numpy(), b.numpy()) for a, b in groups]
        for position, ours in enumerate(found):
            theirs = [part[position] for part in parts]
            joined = np.concatenate(theirs) if position < 2 else np.sum(theirs, axis=0)
            np.testing.assert_allclose(ours.numpy(), joined, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(layer.running_var.numpy(), loop.v, rtol=1e-12)
    assert int(layer.num_batches_tracked) == loop.t


def test_a_forward_over_groups_equals_a_forward_over_each() -> None:
    whole, single = drawn_layer(2, 20), drawn_layer(2, 20)
    single.load_state_dict(whole.state_dict())
    for _ in range(6):
        x, dy = torch.randn(2, 7, 3, 4, 4, dtype=torch.float64).unbind()
        y, dx, *_ = step(whole, x, dy)
        parts = [step(single, a, b) for a, b in zip(x.split(2), dy.split(2), strict=True)]
        torch.testing.assert_close(y, torch.cat([part[0] for part in parts]))
        torch.testing.assert_close(dx, torch.cat([part[1] for part in parts]))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(single.state_dict()[name], value)


def test_evaluation_divides_by_the_moving_second_moment() -> None:
    layer = drawn_layer(2, 100)
    layer(torch.randn(8, 3, 4, 4, dtype=torch.float64))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    column = lambda row: row[None, :, None, None]  # noqa: E731
    expected = column(layer.weight / (layer.running_var + 1e-5).sqrt()) * x + column(layer.bias)
    torch.testing.assert_close(layer.eval()(x), expected)
