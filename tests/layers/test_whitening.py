"""Iterative Normalization against its formula, group by group and block by block in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bkn_core.errors import StatisticsError
from bkn_core.layers.rivals.whitening import IterativeNorm


def drawn_layer(size: int | None) -> IterativeNorm:
    layer = IterativeNorm(6, 1e-4, 0.3, statistics_batch_size=size, block=3).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    layer.running_mean.normal_(), layer.matrix_past.normal_()
    return layer


def loop(layer: IterativeNorm, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One group (s, C, L): the output, its mean and its matrices."""
    y, means, matrices = np.empty(x.shape), np.empty(6), np.empty((2, 3, 3))
    for k in range(2):
        block = x[:, 3 * k : 3 * k + 3].transpose(1, 0, 2).reshape(3, -1)
        means[3 * k : 3 * k + 3] = block.mean(1)
        centred = block - block.mean(1, keepdims=True)
        covariance = centred @ centred.T / block.shape[1] + layer.eps * np.eye(3)
        p = np.eye(3)
        for _ in range(5):
            p = 1.5 * p - 0.5 * p @ p @ p @ covariance / np.trace(covariance)
        matrices[k] = p / np.sqrt(np.trace(covariance))
        y[:, 3 * k : 3 * k + 3] = (matrices[k] @ centred).reshape(3, len(x), -1).transpose(1, 0, 2)
    gamma, beta = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    return y * gamma[None, :, None] + beta[None, :, None], means, matrices


@pytest.mark.parametrize("size", [None, 1, 2, 3])
@pytest.mark.parametrize("shape", [(7, 6, 4, 5), (7, 6, 9)])
def test_a_step_equals_the_formula(size: int | None, shape: tuple[int, ...]) -> None:
    layer = drawn_layer(size)
    x = torch.randn(shape, dtype=torch.float64) @ torch.randn(shape[-1], shape[-1], dtype=torch.float64) + 1
    mean, matrix = layer.running_mean.numpy().copy(), layer.matrix_past.numpy().copy()
    groups = [part.flatten(2).numpy() for part in x.split(size or 7)]
    parts = [loop(layer, group) for group in groups]
    expected = np.concatenate([y for y, _, _ in parts]).reshape(shape)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-9, atol=1e-9)
    share = np.array([len(group) / 7 for group in groups])
    new_mean = np.einsum("g,gc->c", share, [m for _, m, _ in parts])
    new_matrix = np.einsum("g,gkij->kij", share, [w for _, _, w in parts])
    np.testing.assert_allclose(layer.running_mean.numpy(), 0.7 * mean + 0.3 * new_mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(layer.matrix_past.numpy(), 0.7 * matrix + 0.3 * new_matrix, rtol=1e-9, atol=1e-12)


def test_the_gradient_is_that_of_the_formula() -> None:
    layer = drawn_layer(2)
    assert torch.autograd.gradcheck(layer, torch.randn(4, 6, 2, 3, dtype=torch.float64, requires_grad=True))


def test_channels_come_out_uncorrelated() -> None:
    layer = IterativeNorm(4, block=4).double()
    x = torch.randn(64, 4, 8, 8, dtype=torch.float64)
    mixed = torch.einsum("ij,njhw->nihw", torch.eye(4, dtype=torch.float64) + 0.3, x)
    covariance = torch.cov(layer(mixed).movedim(1, 0).flatten(1))
    torch.testing.assert_close(covariance, torch.eye(4, dtype=torch.float64), rtol=0, atol=0.02)


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 4), (2, 6, 4, 3), (2, 6, 2, 3, 2)])
def test_folding_equals_evaluation(shape: tuple[int, ...]) -> None:
    layer, x = drawn_layer(2).eval(), torch.randn(shape, dtype=torch.float64)
    expected = torch.empty(shape, dtype=torch.float64)
    for n in range(2):
        for k in range(2):
            block = slice(3 * k, 3 * k + 3)
            values = (x[n, block].flatten(1) if len(shape) > 2 else x[n, block, None]) - layer.running_mean[block, None]
            y = layer.weight[block, None] * (layer.matrix_past[k] @ values) + layer.bias[block, None]
            expected[n, block] = y.reshape(expected[n, block].shape).detach()
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.folded(nn.Identity)(x), expected)


def test_a_group_of_one_value_per_channel_is_refused() -> None:
    with pytest.raises(StatisticsError, match="one value"):
        IterativeNorm(6, statistics_batch_size=2, block=3)(torch.randn(5, 6))
