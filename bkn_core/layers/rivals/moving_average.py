"""Moving Average Batch Normalization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.filter.autograd import once_differentiable
from bkn_core.filter.kalman import spread_over_images
from bkn_core.layers.rivals.groups import Rival, group_means, image_means, moving_average, spread, wide

_SIMULATED = 32  # images that the statistics of several groups stand for
_DECAY = 0.98  # of v
_LIMIT = 5.0  # of r
_OWN, _PLAIN = 1 / 200, 1 / 20  # parts of the training: own statistics alone, and r = 1 (100 and 1000 of 20 000 steps)


class MovingAverageNorm(Rival):
    """Divide by second moments averaged over the last groups, and average what the gradient needs likewise.

        χ = <x²>,   V = mean of the last M χ,   z = x / sqrt(V + ε),   r = clip(sqrt(V + ε) / sqrt(v + ε), 1/5, 5)
        y = γ r z + β,   v ← 0.98 v + 0.02 V
        dx = (γ r dy - z Ψ) / sqrt(V + ε),   Ψ = mean of the last M <γ r dy z>

    No mean is subtracted: the weights before the layer are centred. M groups hold 32 images. V and Ψ are those of the
    group itself for the first M groups and the first 0.5 % of the training; r is 1 for its first 5 %. A forward over
    several groups gives what as many forwards over one group each give. The gradient is not that of the loss.

    Args:
        num_features: C.
        eps: ε.
        statistics_batch_size: images per group; None is the whole batch.

    Shape:
        x (N, C, *spatial) -> the same.

    Reference:
        Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization", 2001.06838.
    """

    kind = "mabn"
    square_past: Tensor
    gradient_past: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, *, statistics_batch_size: int | None = None) -> None:
        super().__init__(num_features, eps, None)
        self.statistics_batch_size = statistics_batch_size
        size = max(1, _SIMULATED // (statistics_batch_size or _SIMULATED))
        for name in ("square_past", "gradient_past"):
            self.register_buffer(name, torch.zeros(size, num_features))

    def take_over_(self, _: _BatchNorm) -> None:
        """Turn inherited mean and variance, in place, into a second moment."""
        assert self.running_mean is not None and self.running_var is not None
        self.running_var.add_(self.running_mean.square())
        self.running_mean.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, and in training remember."""
        assert self.running_var is not None and self.num_batches_tracked is not None
        if not self.training:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            return (x * spread(scale[None], x) + spread(self.bias[None], x)).to(x.dtype)
        with torch.no_grad():
            observed = group_means(image_means(wide(x).square()), self.statistics_batch_size)
            number = self.seen(len(observed))
            is_own = (number <= len(self.square_past)) | (number < self.length * _OWN)
            variance = torch.where(is_own, observed, last_means_(self.square_past, observed))
            running = moving_average(variance, _DECAY, self.running_var)
            r = ((variance + self.eps) / (running[:-1] + self.eps)).sqrt().clamp(1 / _LIMIT, _LIMIT)
            r = torch.where(number <= self.length * max(_OWN, _PLAIN), torch.ones_like(r), r)
            self.running_var.copy_(running[-1])
            self.num_batches_tracked.add_(len(observed))
        form = (self.statistics_batch_size, is_own, self.gradient_past)
        return _Divide.apply(x, (variance + self.eps).rsqrt(), r, self.weight, self.bias, form)  # type: ignore[no-any-return]


def last_means_(ring: Tensor, newest: Tensor) -> Tensor:
    """Return the mean of the last M rows at each of the newest ones, itself included, and remember them in place.

    Shape:
        ring (M, C), oldest first, newest (G, C) -> (G, C).
    """
    rows = torch.cat([ring, newest.to(ring.dtype)])
    ring.copy_(rows[-len(ring) :])
    return rows[1:].unfold(0, len(ring), 1).mean(-1)


class _Divide(torch.autograd.Function):
    """γ r x / sqrt(V + ε) + β, with the averaged Ψ in the place of the group's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor, r: Tensor, weight: Tensor, bias: Tensor, form: Any) -> Tensor:
        """Apply the group's row to each image."""
        ctx.save_for_backward(x, inverse, r, weight)
        ctx.form = form
        rows = spread_over_images(inverse * r * weight, len(x), form[0])
        return (x * spread(rows, x) + spread(bias[None], x)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Follow the paper, not the chain rule."""
        x, inverse, r, weight = saved
        size, is_own, ring = ctx.form
        inverse, r = (spread_over_images(rows, len(x), size) for rows in (inverse, r))
        z, dy = wide(x) * spread(inverse, x), wide(gradient)
        products = image_means(dy * z)
        own = group_means(products * r * weight, size)
        psi = torch.where(is_own, own, last_means_(ring, own))
        psi = spread_over_images(psi, len(x), size)
        dx = (dy * spread(r * weight, x) - z * spread(psi, x)) * spread(inverse, x)
        count = x.shape[2:].numel()
        return dx.to(x.dtype), None, None, (products * r).sum(0) * count, image_means(dy).sum(0) * count, None
