"""Normalization Propagation: what a layer gives has zero mean and unit variance by construction, without statistics."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.layers.baselines import ChannelAffine
from bkn_core.layers.rivals.groups import Rival, spread

_MEAN = math.sqrt(1 / (2 * math.pi))  # of relu(n) for a standard normal n
_DEVIATION = math.sqrt((1 - 1 / math.pi) / 2)
_ISOMETRY = math.sqrt(1 - 1 / math.pi)  # 1 / 1.21


class NormalizationPropagation(Rival):
    """Scale and shift what filters of unit norm give, and standardize what a ReLU makes of a normal distribution.

        h = γ (w / |w|) x + β,   y = ( max(h, 0) - sqrt(1 / 2π) ) / sqrt((1 - 1/π) / 2)

    The convolution before the layer has the unit weights. γ begins at 1/1.21. Without a ReLU of its own it is h alone.

    Args:
        num_features: C.
        eps: has no effect.
        activates: whether the layer stands for the ReLU behind it too.

    Shape:
        x (N, C, *spatial) -> the same.

    Reference:
        Arpit et al., "Normalization Propagation", 1603.01431.
    """

    kind = "normprop"

    def __init__(self, num_features: int, eps: float = 1e-5, *, activates: bool = True) -> None:
        super().__init__(num_features, eps, None, track_running_stats=False)
        self.activates = activates
        self.take_over_(self)

    @torch.no_grad()
    def take_over_(self, _: _BatchNorm) -> None:
        """Scale γ, in place, so that the layer's Jacobian has singular values of 1 in the mean."""
        if self.activates:
            self.weight.mul_(_ISOMETRY)

    def forward(self, x: Tensor) -> Tensor:
        """Scale, shift, activate."""
        y: Tensor = x * spread(self.weight[None], x) + spread(self.bias[None], x)
        return ((y.clamp_min(0) - _MEAN) / _DEVIATION if self.activates else y).to(x.dtype)

    def folded(self, affine: Callable[[], nn.Module]) -> nn.Module:
        """Return the affine maps before and behind the ReLU."""
        before = ChannelAffine(self.weight.detach(), self.bias.detach())
        if not self.activates:
            return before
        ones = torch.ones_like(self.weight.detach())
        return nn.Sequential(before, nn.ReLU(), ChannelAffine(ones / _DEVIATION, ones * (-_MEAN / _DEVIATION)))
