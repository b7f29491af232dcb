"""Inception with Batch Normalization, the network that Batch Normalization was introduced with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bkn_core.engine.cifar_networks import initialize


class Widths(NamedTuple):
    """Channels of a module's branches, and how its last branch pools.

    Args:
        single: of the 1×1 convolution; 0 is none, and the module halves the image.
        middle: of the 1×1 and the 3×3 convolution of the second branch.
        double: of the 1×1 and both 3×3 convolutions of the third branch.
        pool: "average" or "maximum".
        pooled: of the 1×1 convolution behind the pool; 0 passes on what was pooled.
    """

    single: int
    middle: tuple[int, int]
    double: tuple[int, int]
    pool: str
    pooled: int

    def outputs(self, inputs: int) -> int:
        """Return the channels of all branches together."""
        return self.single + self.middle[1] + self.double[1] + (self.pooled or inputs)


MODULES = {
    "3a": Widths(64, (64, 64), (64, 96), "average", 32),
    "3b": Widths(64, (64, 96), (64, 96), "average", 64),
    "3c": Widths(0, (128, 160), (64, 96), "maximum", 0),
    "4a": Widths(224, (64, 96), (96, 128), "average", 128),
    "4b": Widths(192, (96, 128), (96, 128), "average", 128),
    "4c": Widths(160, (128, 160), (128, 160), "average", 128),
    "4d": Widths(96, (128, 192), (160, 192), "average", 128),
    "4e": Widths(0, (128, 192), (192, 256), "maximum", 0),
    "5a": Widths(352, (192, 320), (160, 224), "average", 128),
    "5b": Widths(352, (192, 320), (192, 224), "maximum", 128),
}
"""The table of arXiv 1502.03167, figure 5. It gives 576 channels to 4c and 4d, whose branches add up to 608."""


class Module(nn.Module):
    """Branches of convolutions beside each other."""

    def __init__(self, inputs: int, widths: Widths) -> None:
        super().__init__()
        stride = 1 if widths.single else 2
        pool = nn.MaxPool2d(3, stride, 1) if widths.pool == "maximum" else nn.AvgPool2d(3, stride, 1)
        (reduced, middle), (narrow, wide) = widths.middle, widths.double
        branches = [
            nn.Sequential(convolution(inputs, reduced, 1), convolution(reduced, middle, 3, stride)),
            nn.Sequential(
                convolution(inputs, narrow, 1), convolution(narrow, wide, 3), convolution(wide, wide, 3, stride)
            ),
            nn.Sequential(pool, convolution(inputs, widths.pooled, 1)) if widths.pooled else pool,
        ]
        self.branches = nn.ModuleList([convolution(inputs, widths.single, 1)] if widths.single else [])
        self.branches.extend(branches)

    def forward(self, x: Tensor) -> Tensor:
        """Lay the channels of the branches behind each other."""
        return torch.cat([branch(x) for branch in self.branches], 1)


class InceptionV2(nn.Sequential):
    """The network of arXiv 1502.03167 for images of 224×224, also called BN-Inception: 11.3 million parameters.

    Its first convolution is a plain one, where the paper's is separable; it has no auxiliary heads.

    Args:
        classes: number of logits.
        channels: colours of the images.
    """

    def __init__(self, *, classes: int = 1000, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            convolution(channels, 64, 7, 2),
            nn.MaxPool2d(3, 2, 1),
            convolution(64, 64, 1),
            convolution(64, 192, 3),
            nn.MaxPool2d(3, 2, 1),
        )
        inputs = 192
        for name, widths in MODULES.items():
            self.add_module(f"inception_{name}", Module(inputs, widths))
            inputs = widths.outputs(inputs)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(inputs, classes)
        initialize(self)


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution without a bias, its normalization and a ReLU."""
    filters = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(filters, nn.BatchNorm2d(outputs), nn.ReLU())
