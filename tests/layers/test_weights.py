"""Group normalization with weight standardization against a loop over filters, images and groups, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bkn_core.convert import convert

GROUPS = 8  # of 16 channels
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(3, 16, 3, padding=1), (3, 5, 4)),
    "grouped": (lambda: nn.Conv2d(4, 16, 3, stride=2, groups=2, bias=False), (4, 7, 6)),
    "linear": (lambda: nn.Linear(5, 16), (5,)),
}


def standardized(weight: Tensor) -> Tensor:
    """(W - mean) / sqrt(variance + 1e-6), filter by filter."""
    rows = []
    for row in weight.flatten(1):
        mean = sum(row) / len(row)
        variance = sum((value - mean) ** 2 for value in row) / len(row)
        rows.append((row - mean) / (variance + 1e-6) ** 0.5)
    return torch.stack(rows).view(weight.shape)


def grouped(x: Tensor, norm: nn.Module) -> Tensor:
    """Normalize each group of channels of each image by its own mean and variance."""
    images = []
    for image in x:
        groups = []
        for values in image.chunk(GROUPS):
            mean = values.sum() / values.numel()
            variance = ((values - mean) ** 2).sum() / values.numel()
            groups.append((values - mean) / (variance + norm.eps) ** 0.5)
        images.append(torch.cat(groups))
    shape = (-1, *([1] * (x.dim() - 2)))
    return torch.stack(images) * norm.weight.view(shape) + norm.bias.view(shape)


@pytest.mark.parametrize("name", LAYERS)
def test_standardized_weights_and_groups_equal_the_formula(name: str) -> None:
    build, shape = LAYERS[name]
    layer = build()
    norm = (nn.BatchNorm1d if len(shape) == 1 else nn.BatchNorm2d)(16, eps=1e-3)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    images = torch.randn(3, *shape, dtype=torch.float64)
    model = convert(nn.Sequential(layer, norm).double(), images, kind="gn_ws")
    convolution, normalization = model
    original = convolution.parametrizations.weight.original
    weight, bias = standardized(original), convolution.bias
    if name == "linear":
        x = F.linear(images, weight, bias)
    else:
        x = F.conv2d(images, weight, bias, convolution.stride, convolution.padding, groups=convolution.groups)
    found, expected = model.train()(images), grouped(x, normalization)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.eval()(images), expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(found)
    gradients = [torch.autograd.grad(y, list(model.parameters()), upstream) for y in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
