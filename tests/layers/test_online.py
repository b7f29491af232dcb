"""Online Normalization against its formula, image after image in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bkn_core.layers.rivals.online import OnlineNorm

STATE = ("running_mean", "running_var", "scale_past", "mean_past")


def drawn_layer() -> OnlineNorm:
    layer = OnlineNorm(3).double().train()
    nn.init.normal_(layer.weight, 1.0), nn.init.normal_(layer.bias)
    layer.running_mean.normal_(), layer.running_var.uniform_(0.1, 2)
    layer.scale_past.normal_(), layer.mean_past.normal_()
    return layer


def loop(layer: OnlineNorm, x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, ...]:
    gamma, beta = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    m, v, w, u = (
        layer.get_buffer(name).numpy().copy() for name in ("running_mean", "running_var", "scale_past", "mean_past")
    )
    y, dx, to_gamma, to_beta = np.empty(x.shape), np.empty(x.shape), np.zeros(3), np.zeros(3)
    for n in range(len(x)):
        for c in range(3):
            z = (x[n, c] - m[c]) / np.sqrt(v[c] + layer.eps)
            scale = 1 / np.sqrt(v[c] + layer.eps)
            mean, variance = x[n, c].mean(), x[n, c].var()
            v[c] = 0.999 * v[c] + 0.001 * variance + 0.999 * 0.001 * (mean - m[c]) ** 2
            m[c] += 0.001 * (mean - m[c])
            affine = gamma[c] * z + beta[c]
            y[n, c] = np.clip(affine, -5, 5)
            through = dy[n, c] * (np.abs(affine) <= 5)
            to_gamma[c] += (through * z).sum()
            to_beta[c] += through.sum()
            g = gamma[c] * through - 0.01 * w[c] * z
            w[c] += (g * z).mean()
            dx[n, c] = g * scale - 0.01 * u[c]
            u[c] += dx[n, c].mean()
    return y, dx, to_gamma, to_beta, m, v, w, u


def step(layer: OnlineNorm, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    state = [layer.get_buffer(name) for name in STATE]
    return y.detach(), x.grad, layer.weight.grad, layer.bias.grad, *state


@pytest.mark.parametrize("images", [1, 2, 7, 32])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_step_equals_the_formula_image_by_image(images: int, scale: float) -> None:
    layer = drawn_layer()
    x, dy = torch.randn(2, images, 3, 4, 5, dtype=torch.float64).unbind()
    expected = loop(layer, (scale * x).numpy(), dy.numpy())
    for found, wanted in zip(step(layer, scale * x, dy), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-9)
    assert int(layer.num_batches_tracked) == images


def test_vectors_without_positions_are_normalized_too() -> None:
    layer = drawn_layer()
    x, dy = torch.randn(2, 6, 3, dtype=torch.float64).unbind()
    expected = loop(layer, x.numpy()[..., None, None], dy.numpy()[..., None, None])
    np.testing.assert_allclose(step(layer, x, dy)[0].numpy(), expected[0][..., 0, 0], rtol=1e-9)


def test_evaluation_clips_what_the_moving_statistics_normalize() -> None:
    layer = drawn_layer().eval()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) * 9
    plain = nn.functional.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), plain.clamp(-5, 5))
    assert (layer(x).abs() == 5).any()
