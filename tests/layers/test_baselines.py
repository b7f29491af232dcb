"""The baselines that `torch.nn` does not have, against their papers' formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bkn_core.errors import StatisticsError
from bkn_core.layers.baselines import BatchRenorm, ChannelAffine, FrozenNorm


def test_batch_renorm_starts_as_batch_norm() -> None:
    layer, reference = BatchRenorm(3), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5) * 2 + 1
    torch.testing.assert_close(layer(x), reference(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_mean, reference.running_mean)
    torch.testing.assert_close(layer.running_var, reference.running_var)
    assert int(layer.num_batches_tracked) == 1


@pytest.mark.parametrize(("seen", "r_max", "d_max"), [(0, 1, 0), (100, 1, 0), (300, 2, 2.5), (500, 3, 5), (900, 3, 5)])
@pytest.mark.parametrize("size", [None, 2])
def test_batch_renorm_equals_its_formula(seen: int, r_max: float, d_max: float, size: int | None) -> None:
    layer = BatchRenorm(3, statistics_batch_size=size).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    layer.running_mean.copy_(torch.tensor([0.5, -20.0, 0.0]))
    layer.running_var.copy_(torch.tensor([1.5, 0.01, 100.0]))
    layer.num_batches_tracked.fill_(seen)
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    mean, deviation = layer.running_mean.numpy().copy(), np.sqrt(layer.running_var.numpy() + 1e-5)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    expected = np.empty(x.shape)
    for start in range(0, 4, size or 4):
        group = x[start : start + (size or 4)].numpy()
        for c in range(3):
            own = np.sqrt(group[:, c].var() + 1e-5)
            r = np.clip(own / deviation[c], 1 / r_max, r_max)
            d = np.clip((group[:, c].mean() - mean[c]) / deviation[c], -d_max, d_max)
            value = (group[:, c] - group[:, c].mean()) / own * r + d
            expected[start : start + (size or 4), c] = weight[c] * value + bias[c]
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-6, atol=1e-6)


def test_batch_renorm_holds_r_and_d_constant_in_the_gradient() -> None:
    layer = BatchRenorm(2).double()
    layer.num_batches_tracked.fill_(500)
    layer.running_var.fill_(2.0), layer.running_mean.fill_(0.1)
    x = torch.randn(6, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    y = layer(x)
    upstream = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    deviation = (x.detach().var((0, 2, 3), correction=0) + 1e-5).sqrt()
    r = (deviation / (state["running_var"] + 1e-5).sqrt()).clamp(1 / 3, 3)
    d = ((x.detach().mean((0, 2, 3)) - state["running_mean"]) / (state["running_var"] + 1e-5).sqrt()).clamp(-5, 5)
    plain = nn.functional.batch_norm(x, None, None, training=True) * r.view(1, -1, 1, 1) + d.view(1, -1, 1, 1)
    (expected,) = torch.autograd.grad(plain, x, upstream)
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(gradient, expected)


def test_batch_renorm_evaluates_as_batch_norm_and_refuses_single_values() -> None:
    layer, reference = BatchRenorm(3), nn.BatchNorm1d(3)
    layer(torch.randn(5, 3) + 2)
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3)
    torch.testing.assert_close(layer.eval()(x), reference.eval()(x))
    with pytest.raises(StatisticsError, match="one value"):
        BatchRenorm(3, statistics_batch_size=1)(x)


def test_frozen_norm_keeps_its_statistics_in_training() -> None:
    layer, reference = FrozenNorm(3), nn.BatchNorm2d(3)
    reference(torch.randn(4, 3, 5, 5) + 2)
    layer.load_state_dict(reference.state_dict())
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(layer.train()(x), reference.eval()(x))
    assert torch.equal(layer.running_mean, reference.running_mean)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 4), (2, 3, 2, 2, 2)])
def test_channel_affine_scales_and_shifts_every_channel(shape: tuple[int, ...]) -> None:
    scale, shift, x = torch.randn(3), torch.randn(3), torch.randn(shape)
    y = ChannelAffine(scale, shift)(x)
    for c in range(3):
        torch.testing.assert_close(y[:, c], x[:, c] * scale[c] + shift[c])
