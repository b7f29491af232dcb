"""Normalization Propagation against its formula."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from bkn_core.convert import convert
from bkn_core.layers.rivals.propagation import NormalizationPropagation


def test_a_model_equals_the_formula() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    converted: Any = convert(model, x, kind="normprop")
    nn.init.normal_(converted[1].bias)
    found = converted(x)
    for c in range(4):
        kernel = model[0].weight[c : c + 1]
        z = nn.functional.conv2d(x, kernel / kernel.square().sum().sqrt())[:, 0]
        h = (z * math.sqrt(1 - 1 / math.pi) + converted[1].bias[c]).clamp_min(0)
        expected = (h - math.sqrt(1 / (2 * math.pi))) / math.sqrt((1 - 1 / math.pi) / 2)
        torch.testing.assert_close(found[:, c], expected)
    torch.testing.assert_close(converted.eval()(x), found)


def test_a_standard_normal_input_comes_out_with_mean_0_and_variance_1() -> None:
    layer = NormalizationPropagation(2)
    nn.init.ones_(layer.weight)
    y = layer(torch.randn(400_000, 2, generator=torch.Generator().manual_seed(0)))
    assert y.mean().abs() < 0.01 and (y.var() - 1).abs() < 0.01


def test_without_a_relu_of_its_own_a_layer_is_affine() -> None:
    layer = NormalizationPropagation(2, activates=False)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    x = torch.randn(3, 2)
    torch.testing.assert_close(layer(x), x * layer.weight + layer.bias)
