"""The networks of robustness.py: the package's own, a small one in the manner of MobileNet, and a small U-Net."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from bkn_core.engine.cifar_networks import initialize
from bkn_core.engine.models import build_network

CLASSIFIERS = ("cifar_plain", "cifar_resnet8", "cifar_resnet20", "cifar_preact_resnet14", "mobile")
SEGMENTER = "unet"


def build(name: str, *, classes: int, channels: int) -> nn.Module:
    """Build a network by name, with `nn.BatchNorm2d` layers.

    Args:
        name: one of `CLASSIFIERS` or `SEGMENTER`.
        classes: number of logits, of an image or of a pixel.
        channels: colours of the images.
    """
    if name == SEGMENTER:
        return UNet(classes=classes, channels=channels)
    if name == "mobile":
        return mobile(classes=classes, channels=channels)
    return build_network(name, classes=classes, channels=channels)


def _normalized(convolution: nn.Conv2d, activation: nn.Module) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(convolution.out_channels), activation]


def mobile(*, classes: int, channels: int) -> nn.Module:
    """Return thirteen convolutions, every second one depthwise, each with its norm layer and ReLU6."""
    widths, strides = (24, 48, 64, 64, 96, 96, 96), (1, 2, 1, 2, 1, 1)
    layers = _normalized(nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False), nn.ReLU6())
    for inputs, outputs, stride in zip(widths, widths[1:], strides, strict=False):
        layers += _normalized(nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), nn.ReLU6())
        layers += _normalized(nn.Conv2d(inputs, outputs, 1, bias=False), nn.ReLU6())
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))
    initialize(network)
    return network


class UNet(nn.Module):
    """Blocks of two normalized convolutions, down by max pooling, up by transposed ones, with skips (1505.04597).

    Args:
        classes: logits of each pixel.
        channels: colours of the images, whose sides 8 divides.
        widths: channels at each size.
        dimensions: of the images: 2, or 3.
    """

    def __init__(
        self, *, classes: int, channels: int = 3, widths: tuple[int, ...] = (16, 32, 64, 96), dimensions: int = 2
    ) -> None:
        super().__init__()
        self.kinds = (nn.Conv2d, nn.BatchNorm2d) if dimensions == 2 else (nn.Conv3d, nn.BatchNorm3d)
        rising = nn.ConvTranspose2d if dimensions == 2 else nn.ConvTranspose3d
        pairs = list(itertools.pairwise(widths))
        self.first = self._block(channels, widths[0])
        self.down = nn.ModuleList(self._block(narrow, wide) for narrow, wide in pairs)
        self.up = nn.ModuleList(rising(wide, narrow, 2, 2) for narrow, wide in reversed(pairs))
        self.joined = nn.ModuleList(self._block(2 * narrow, narrow) for narrow, _ in reversed(pairs))
        self.pool = nn.MaxPool2d(2) if dimensions == 2 else nn.MaxPool3d(2)
        self.head = self.kinds[0](widths[0], classes, 1)
        initialize(self)

    def _block(self, inputs: int, outputs: int) -> nn.Sequential:
        convolution, norm = self.kinds
        layers: list[nn.Module] = []
        for width in (inputs, outputs):
            layers += [convolution(width, outputs, 3, 1, 1, bias=False), norm(outputs), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes, H, W)."""
        levels = [self.first(x)]
        for block in self.down:
            levels.append(block(self.pool(levels[-1])))
        y = levels.pop()
        for up, block in zip(self.up, self.joined, strict=True):
            y = block(torch.cat((up(y), levels.pop()), 1))
        return self.head(y)  # type: ignore[no-any-return]
