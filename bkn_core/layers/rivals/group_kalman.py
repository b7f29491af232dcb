"""Group Kalman Normalization: group normalization whose statistics follow those of the layer before."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from bkn_core.filter.kalman import Gaussian, normalize, predict, rectangular_identity, update
from bkn_core.layers.rivals.groups import exactly, wide
from bkn_core.layers.rivals.handover import Handover

_GAIN, _NOISE = 0.9, 0.1  # where q begins, and the root of r


class GroupKalmanNorm(nn.GroupNorm):
    """Blend the moments of each image's groups of channels with those that the layer before predicts.

        µ' = A µ_prev,   v' = (A∘A) v_prev + r
        µ̂ = µ' + q (x̄ - µ'),   v̂ = (1-q) v' + q S + q (1-q) (x̄ - µ')²,   y = γ (x - µ̂) / sqrt(v̂ + ε) + β

    A begins as the identity, q at 0.9 and r at 0.01; all are learned. The first layer is group normalization. Training
    and evaluation do the same. The paper's layer is read so from its equations for batches; its text was not compared.

    Args:
        num_groups: G.
        num_channels: C.
        eps: ε.

    Shape:
        x (N, C, *spatial) -> the same.

    Reference:
        Wang et al., "Kalman Normalization", 1802.03133.
    """

    kind: ClassVar[str] = "gkn"
    transition: nn.Parameter | None
    noise: nn.Parameter | None
    gain_logit: nn.Parameter | None

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__(num_groups, num_channels, eps)
        self.source: Handover[Gaussian] | None = None
        self.target: Handover[Gaussian] | None = None
        self.transition = self.noise = self.gain_logit = None

    def follow_(self, previous: GroupKalmanNorm) -> None:
        """Predict, from now on, from the groups of another layer, which runs before."""
        previous.target = self.source = Handover()
        like = self.weight.detach()
        self.transition = nn.Parameter(rectangular_identity(self.num_groups, previous.num_groups, like))
        self.noise = nn.Parameter(torch.full_like(like[0], _NOISE))
        self.gain_logit = nn.Parameter(torch.full_like(like[0], math.log(_GAIN / (1 - _GAIN))))

    def forward(self, x: Tensor) -> Tensor:
        """Observe, predict, blend, normalize."""
        grouped = wide(x).reshape(x.shape[0], self.num_groups, -1)
        variance, mean = torch.var_mean(grouped, 2, correction=0)
        posterior = Gaussian(mean, variance)
        previous = None if self.source is None else self.source.take()
        if previous is not None and previous.mean.shape[0] == x.shape[0]:
            assert self.transition is not None and self.noise is not None and self.gain_logit is not None
            with exactly(x):
                prior = predict(previous, self.transition.to(mean.dtype), self.noise.square())
            posterior = update(prior, posterior, self.gain_logit.sigmoid())
        if self.target is not None:
            self.target.content = posterior
        size = self.num_channels // self.num_groups
        rows = Gaussian(*(values.repeat_interleave(size, 1) for values in posterior))
        return normalize(x, rows, self.weight, self.bias, self.eps)
