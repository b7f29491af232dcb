"""Online Normalization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bkn_core.filter.autograd import once_differentiable
from bkn_core.layers.rivals.groups import Rival, image_means, moving_average, recurrence, spread, wide

_FORWARD, _BACKWARD = 0.999, 0.99  # decays a, b
_LIMIT = 5.0


class OnlineNorm(Rival):
    """Normalize each image by the moving statistics of those before it, and control the bias of its gradient.

        z = (x - m) / sqrt(V + ε),   y = clip(γ z + β, ±5)
        V ← a V + (1-a) s² + a(1-a) (µ - m)²,   m ← m + (1-a) (µ - m)
        g = dz - (1-b) w z,   w ← w + <g z>,   h = g / sqrt(V + ε),   dx = h - (1-b) u,   u ← u + <dx>

    image after image; µ, s² are an image's own moments, a = 0.999, b = 0.99. All images of a forward are computed at
    once, by linear recurrences. The gradient is not that of the loss.

    Args:
        num_features: C.
        eps: ε.

    Shape:
        x (N, C, *spatial) -> the same.

    Reference:
        Chiley et al., "Online Normalization for Training Neural Networks", 1905.05894.
    """

    kind = "online"
    scale_past: Tensor
    mean_past: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps, None)
        for name in ("scale_past", "mean_past"):
            self.register_buffer(name, torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, and in training remember."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        if self.training:
            with torch.no_grad():
                means, deviations = self._advance(x)
                self.num_batches_tracked.add_(len(x))
            z = _Steer.apply(x, means, deviations.reciprocal(), self.scale_past, self.mean_past)
        else:
            means, deviations = self.running_mean[None], (self.running_var[None] + self.eps).sqrt()
            z = (wide(x) - spread(means, x)) / spread(deviations, x)
        y = z * spread(self.weight[None], x) + spread(self.bias[None], x)
        result: Tensor = y.clamp(-_LIMIT, _LIMIT).to(x.dtype)
        return result

    def _advance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each image is normalized by, (N, C), and move the statistics."""
        assert self.running_mean is not None and self.running_var is not None
        values = wide(x)
        mean = image_means(values)
        variance = image_means((values - spread(mean, x)).square())
        means = moving_average(mean, _FORWARD, self.running_mean)
        variances = moving_average(variance + _FORWARD * (mean - means[:-1]).square(), _FORWARD, self.running_var)
        self.running_mean.copy_(means[-1])
        self.running_var.copy_(variances[-1])
        return means[:-1], (variances[:-1] + self.eps).sqrt()

    def folded(self, affine: Callable[[], nn.Module]) -> nn.Module:
        """Return the affine map and the clip behind it."""
        return nn.Sequential(affine(), nn.Hardtanh(-_LIMIT, _LIMIT))


class _Steer(torch.autograd.Function):
    """(x - m) / sqrt(V + ε), with the controlled gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, means: Tensor, inverse: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
        """Apply each image's row."""
        z = (wide(x) - spread(means, x)) * spread(inverse, x)
        ctx.save_for_backward(z, inverse)
        ctx.controls, ctx.kind = (scale, mean), x.dtype
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Take the images in order: w_{n+1} = (1 - (1-b) <z²>) w_n + <dz z>,   u_{n+1} = b u_n + <h>."""
        z, inverse = saved
        scale, mean = ctx.controls
        factors = 1 - (1 - _BACKWARD) * image_means(z.square())
        scales = recurrence(factors, image_means(gradient * z), scale)
        h = (gradient - (1 - _BACKWARD) * spread(scales[:-1], z) * z) * spread(inverse, z)
        means = recurrence(torch.full_like(factors, _BACKWARD), image_means(h), mean)
        scale.copy_(scales[-1])
        mean.copy_(means[-1])
        dx = h - (1 - _BACKWARD) * spread(means[:-1], z)
        return dx.to(ctx.kind), None, None, None, None
