"""A U-Net: a contracting path, an expanding one, and bridges between them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bkn_core.errors import RecipeError

_MOST_LEVELS = 8


class UNet(nn.Module):
    """Ronneberger, Fischer and Brox, arXiv 1505.04597, with padded convolutions and normalization.

    Args:
        classes: number of logits of each pixel.
        channels: colours of the images.
        width: channels of the first level; each level below has twice as many.
        depth: levels; the image is halved between them.
        up: enlarge by a transposed convolution, or by a bilinear resize and a 1 x 1 convolution.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        *,
        width: int = 16,
        depth: int = 4,
        up: Literal["transposed", "resize"] = "transposed",
    ) -> None:
        super().__init__()
        if up not in ("transposed", "resize"):
            raise RecipeError(f"model.args.up is {up!r}", "Choose transposed or resize.")
        if not 2 <= depth <= _MOST_LEVELS:
            raise RecipeError(f"model.args.depth is {depth}", f"Give 2 to {_MOST_LEVELS} levels.")
        widths = [width * 2**level for level in range(depth)]
        self.stride = 2 ** (depth - 1)
        self.down = nn.ModuleList(_block(*pair) for pair in zip([channels, *widths], widths, strict=False))
        steps = [*zip(widths[:0:-1], widths[-2::-1], strict=True)]
        self.up = nn.ModuleList(_enlarging(deep, shallow, up) for deep, shallow in steps)
        self.mix = nn.ModuleList(_block(2 * shallow, shallow) for _, shallow in steps)
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes, H, W)."""
        height, width = x.shape[2:]
        below, beside = -height % self.stride, -width % self.stride
        if below or beside:
            return self.forward(F.pad(x, (0, beside, 0, below)))[..., :height, :width]
        bridges = []
        for level, stage in enumerate(self.down):
            x = stage(x if level == 0 else F.max_pool2d(x, 2))
            bridges.append(x)
        for enlarge, mix, bridge in zip(self.up, self.mix, bridges[-2::-1], strict=True):
            x = mix(torch.cat([enlarge(x), bridge], 1))
        logits: Tensor = self.head(x)
        return logits


def _block(inner: int, outer: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inner, outer):
        layers += [nn.Conv2d(width, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _enlarging(deep: int, shallow: int, up: str) -> nn.Module:
    if up == "transposed":
        return nn.ConvTranspose2d(deep, shallow, 2, stride=2)
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), nn.Conv2d(deep, shallow, 1))
