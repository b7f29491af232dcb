"""The normalizations that `bkn compare` sets beside ours and that `torch.nn` does not have."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.errors import StatisticsError
from bkn_core.filter.kalman import Gaussian, moments, normalize, spread_over_images


class BatchRenorm(_BatchNorm):
    """Batch renormalization: batch statistics, corrected towards the moving ones by clipped constants r and d.

        y = γ ((x - x̄) / σ_B · r + d) + β,   r = clip(σ_B / σ, 1/r_max, r_max),   d = clip((x̄ - µ) / σ, ±d_max)

    The limits open from batch normalization (r_max 1, d_max 0) to 3 and 5 over `warmup` batches.

    Args:
        num_features: C.
        eps: ε.
        momentum: weight of the newest batch in the moving statistics.
        statistics_batch_size: images per statistics group; None is the whole batch.
        warmup: batches until the limits are fully open, after a first fifth of them as batch normalization.

    Shape:
        x (N, C, *spatial) -> the same.

    Reference:
        Ioffe, "Batch Renormalization", arXiv 1702.03275.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        statistics_batch_size: int | None = None,
        warmup: int = 500,
    ) -> None:
        super().__init__(num_features, eps, momentum)
        self.statistics_batch_size, self.warmup = statistics_batch_size, warmup

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, and in training move the statistics."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        observed = moments(x, self.statistics_batch_size)
        if bool((observed.count < 2).any()):
            raise StatisticsError("a statistics group has one value per channel", "Use a larger statistics_batch_size.")
        opened = ((self.num_batches_tracked / self.warmup - 0.2) / 0.8).clamp(0, 1)
        r_max, d_max = 1 + 2 * opened, 5 * opened
        with torch.no_grad():
            deviation = (observed.variance + self.eps).sqrt()
            population = (self.running_var + self.eps).sqrt()
            r = torch.minimum(torch.maximum(deviation / population, 1 / r_max), r_max)
            d = torch.minimum(torch.maximum((observed.mean - self.running_mean) / population, -d_max), d_max)
        # (x - x̄) r / σ_B + d is a normalization by another mean and variance.
        inverse = (observed.variance + self.eps).rsqrt() * r
        shifted = Gaussian(observed.mean - d / inverse, inverse.square().reciprocal() - self.eps)
        rows = Gaussian(*(spread_over_images(t, len(x), self.statistics_batch_size) for t in shifted))
        with torch.no_grad():
            share = (observed.count / observed.count.sum())[:, None]
            unbiased = observed.variance * (observed.count / (observed.count - 1))[:, None]
            self.running_mean.lerp_((share * observed.mean).sum(0), self.momentum or 0.0)
            self.running_var.lerp_((share * unbiased).sum(0), self.momentum or 0.0)
            self.num_batches_tracked.add_(1)
        return normalize(x, rows, self.weight, self.bias, self.eps)


class FrozenNorm(_BatchNorm):
    """Normalize by the population statistics at all times, training included: what "frozen batch norm" means.

    Shape:
        x (N, C, *spatial) -> the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the fixed statistics and the learned affine map."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class ChannelAffine(nn.Module):
    """y = scale · x + shift per channel: what is left of a normalization layer at inference.

    Args:
        scale: (C,).
        shift: (C,).

    Shape:
        x (N, C, *spatial) -> the same.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Scale, then shift."""
        shape = (1, -1, *([1] * (x.dim() - 2)))
        return x * self.scale.view(shape) + self.shift.view(shape)

    def extra_repr(self) -> str:
        """Name the channels."""
        return str(len(self.scale))
