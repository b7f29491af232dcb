"""Layers that normalize every image by itself and activate: Filter Response Normalization and EvoNorm-S0."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from bkn_core.layers.rivals.groups import positions, spread, wide

_ALONE = 1e-4  # where learned ε begins


class FilterResponseNorm(nn.Module):
    """Divide by the root of each image's own second moment, then cut off below a learned threshold.

        y = γ x / sqrt(<x²> + ε) + β,   max(y, τ)

    Args:
        num_features: C.
        eps: ε.
        learns_eps: add a learned |ε'|, for images with one value per channel.
        activates: whether there is a threshold τ, in the place of a ReLU.

    Shape:
        x (N, C, *spatial) -> the same.

    Reference:
        Singh and Krishnan, "Filter Response Normalization Layer", 1911.09737.
    """

    kind: ClassVar[str] = "frn"
    learned_eps: nn.Parameter | None
    threshold: nn.Parameter | None

    def __init__(
        self, num_features: int, eps: float = 1e-6, *, learns_eps: bool = False, activates: bool = True
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.learned_eps = nn.Parameter(torch.full((1,), _ALONE)) if learns_eps else None
        self.threshold = nn.Parameter(torch.zeros(num_features)) if activates else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize and cut off."""
        values, eps = wide(x), self.eps if self.learned_eps is None else self.eps + self.learned_eps.abs()
        axes = positions(x)
        squares = values.square().mean(axes, keepdim=True) if axes else values.square()
        y = values * (spread(self.weight[None], x) / (squares + eps).sqrt()) + spread(self.bias[None], x)
        y = y if self.threshold is None else torch.maximum(y, spread(self.threshold[None], x))
        return y.to(x.dtype)


class EvoNorm(nn.Module):
    """Gate every value and divide by the standard deviation of its image's group of channels.

        y = γ x sigmoid(v x) / sqrt(Var_group(x) + ε) + β

    Args:
        num_features: C.
        eps: ε.
        groups: of channels.

    Shape:
        x (N, C, *spatial) -> the same.

    Reference:
        Liu et al., "Evolving Normalization-Activation Layers" (S0), 2004.02967.
    """

    kind: ClassVar[str] = "evonorm"

    def __init__(self, num_features: int, eps: float = 1e-5, *, groups: int = 8) -> None:
        super().__init__()
        self.eps, self.groups = eps, groups
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.slope = nn.Parameter(torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Gate and normalize."""
        values = wide(x)
        grouped = values.reshape(x.shape[0], self.groups, -1)
        centred = grouped - grouped.mean(2, keepdim=True)
        deviation = (centred.square().mean(2) + self.eps).sqrt()
        scale = self.weight / deviation.repeat_interleave(x.shape[1] // self.groups, 1)
        y = values * torch.sigmoid(values * spread(self.slope[None], x)) * spread(scale, x)
        return (y + spread(self.bias[None], x)).to(x.dtype)
