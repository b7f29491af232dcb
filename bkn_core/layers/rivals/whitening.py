"""Iterative Normalization: whitening of blocks of channels by Newton's iterations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.errors import StatisticsError
from bkn_core.filter.kalman import group_images
from bkn_core.layers.rivals.groups import Rival, exactly, spread, wide

_ITERATIONS = 5


class IterativeNorm(Rival):
    """Whiten blocks of d channels over each statistics group.

        S = X X^T / m + ε I,   P₀ = I,   P ← 1.5 P - 0.5 P³ S / tr S  (5 times),   W = P / sqrt(tr S),   y = γ W X + β

    X is centred; mean and W move into running averages, which evaluation uses.

    Args:
        num_features: C.
        eps: ε.
        momentum: weight of the newest batch in the running averages.
        statistics_batch_size: images per group; None is the whole batch.
        block: d, a divisor of C.

    Shape:
        x (N, C, *spatial) -> the same.

    Reference:
        Huang et al., "Iterative Normalization: Beyond Standardization towards Efficient Whitening", 1904.03441.
    """

    kind = "iternorm"
    matrix_past: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        statistics_batch_size: int | None = None,
        block: int = 8,
    ) -> None:
        super().__init__(num_features, eps, 0.1 if momentum is None else momentum)
        self.statistics_batch_size, self.block = statistics_batch_size, block
        self.register_buffer("running_var", None)
        self.register_buffer("matrix_past", torch.eye(block).repeat(num_features // block, 1, 1))

    def take_over_(self, norm: _BatchNorm) -> None:
        """Begin, in place, with the standard deviations of the old layer."""
        if norm.running_var is not None:
            scales = (norm.running_var + self.eps).rsqrt()
            self.matrix_past.copy_(torch.diag_embed(scales.view(-1, self.block)))

    def forward(self, x: Tensor) -> Tensor:
        """Whiten, and in training move the averages."""
        with exactly(x):
            values = wide(x)
            if self.training:
                z = self._whiten(values)
            else:
                assert self.running_mean is not None
                centred = (values - spread(self.running_mean[None], x)).flatten(2) if x.dim() > 2 else None
                centred = (values - self.running_mean)[..., None] if centred is None else centred
                z = (self.matrix_past @ centred.view(len(x), -1, self.block, centred.shape[2])).reshape(x.shape)
            y = z * spread(self.weight[None], x) + spread(self.bias[None], x)
            return y.to(x.dtype)

    def _whiten(self, values: Tensor) -> Tensor:
        assert self.running_mean is not None and self.momentum is not None and self.num_batches_tracked is not None
        sizes = group_images(len(values), self.statistics_batch_size)
        if min(sizes) * values.shape[2:].numel() < 2:
            raise StatisticsError("a statistics group has one value per channel", "Use a larger statistics_batch_size.")
        body = sizes.count(sizes[0]) * sizes[0]
        parts = [_whitened(values[:body], sizes[0], self.block, self.eps)]
        if body < len(values):
            parts.append(_whitened(values[body:], len(values) - body, self.block, self.eps))
        with torch.no_grad():
            shares = [len(z) / len(values) for z, _, _ in parts]
            mean = sum(share * mean.mean(0) for share, (_, mean, _) in zip(shares, parts, strict=True))
            matrix = sum(share * matrix.mean(0) for share, (_, _, matrix) in zip(shares, parts, strict=True))
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[arg-type]
            self.matrix_past.lerp_(matrix, self.momentum)  # type: ignore[arg-type]
            self.num_batches_tracked.add_(len(sizes))
        return torch.cat([z for z, _, _ in parts])

    def folded(self, affine: Callable[[], nn.Module]) -> nn.Module:
        """Return the matrix that the running averages apply, computed in float64."""
        assert self.running_mean is not None
        matrix = self.weight.detach().double().view(-1, self.block, 1) * self.matrix_past.double()
        moved = (matrix @ self.running_mean.double().view(-1, self.block, 1)).flatten()
        shift = self.bias.detach().double() - moved
        return ChannelMatrix(matrix.to(self.running_mean.dtype), shift.to(self.running_mean.dtype))


def _whitened(values: Tensor, size: int, block: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Whiten groups of equal size: z (N, C, *spatial), mean (G, C), W (G, C / d, d, d)."""
    flat = values.flatten(2) if values.dim() > 2 else values.unsqueeze(2)
    groups, length = len(flat) // size, flat.shape[2]
    grouped = flat.view(groups, size, -1, block, length).permute(0, 2, 3, 1, 4).flatten(3)
    mean = grouped.mean(3, keepdim=True)
    centred = grouped - mean
    identity = torch.eye(block, dtype=flat.dtype, device=flat.device)
    covariance = centred @ centred.mT / centred.shape[3] + eps * identity
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    scaled, matrix = covariance / trace, identity.expand_as(covariance)
    for _ in range(_ITERATIONS):
        matrix = 1.5 * matrix - 0.5 * matrix @ matrix @ matrix @ scaled
    matrix = matrix / trace.sqrt()
    z = (matrix @ centred).unflatten(3, (size, length)).permute(0, 3, 1, 2, 4)  # type: ignore[no-untyped-call]
    return z.reshape(values.shape), mean.flatten(1), matrix


class ChannelMatrix(nn.Module):
    """y = M x + shift over blocks of channels: a convolution of one position.

    Args:
        matrix: (C / d, d, d).
        shift: (C,).

    Shape:
        x (N, C, *spatial) -> the same.
    """

    matrix: Tensor
    shift: Tensor

    def __init__(self, matrix: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix.flatten(0, 1))
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels of each block."""
        blocks = len(self.shift) // self.matrix.shape[1]
        convolve = {4: F.conv2d, 5: F.conv3d}.get(x.dim(), F.conv1d)
        values = x.unsqueeze(2) if x.dim() == 2 else x
        weight = self.matrix.view(*self.matrix.shape, *([1] * (values.dim() - 2)))
        y = convolve(values, weight, self.shift, groups=blocks)
        return y.squeeze(2) if x.dim() == 2 else y
