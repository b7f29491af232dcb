"""The passes over an activation that normalization needs, one vectorized pass each for any number of groups.

Every pass works on one row of coefficients per statistics group, (G, C), and runs on the CPU and on CUDA (not run on a
GPU). Two memory layouts are served without a copy: channels first, as (G, s, C, L), and channels last, as
(G, s·L/k, k·C): folding k neighbouring positions into one row makes the inner loop long where a layer has few channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bkn_core.filter.kalman import root_above

_ROW = 512  # values per row of the channels-last form: long enough to vectorize, short enough to stay in cache
_SMALL = 1 << 17  # below this many values, laying coefficients out for long rows costs more than it saves


class Rows(NamedTuple):
    """A view of an activation in which a reduction gives the sums of each group and channel."""

    values: Tensor
    channels: int
    fold: int  # positions per row in channels last; 0 means channels first

    @property
    def positions(self) -> int:
        """Values per group and channel."""
        return self.values[0].numel() // self.channels

    def expand(self, coefficients: Tensor) -> Tensor:
        """Lay (G, C) coefficients out so that they broadcast against the values."""
        if not self.fold:
            return coefficients[:, None, :, None]
        if self.fold == 1:
            return coefficients.unsqueeze(1)
        groups = len(coefficients)
        return coefficients.unsqueeze(1).expand(-1, self.fold, -1).reshape(groups, 1, self.fold * self.channels)

    def total(self, values: Tensor) -> Tensor:
        """Sum over the positions of each group: (G, C)."""
        wide = torch.promote_types(values.dtype, torch.float32)
        if not self.fold:
            return values.sum(3, dtype=wide).sum(1)
        sums = values.sum(1, dtype=wide)
        return sums.view(len(sums), self.fold, self.channels).sum(1) if self.fold > 1 else sums


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a position lie side by side, in two or three dimensions of positions."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if x.dim() == 5:
        return x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return False


def rows(x: Tensor, groups: int, like: Tensor | None = None) -> Rows:
    """View an activation (N, C, *spatial) as rows of equal groups, in the layout of `like` (default: its own).

    Copies only where its memory is in another layout.
    """
    like = x if like is None else like
    channels = x.shape[1]
    if x.dim() == 2:
        return Rows(x.contiguous().view(groups, -1, channels), channels, 1)
    if not is_channels_last(like):
        return Rows(x.contiguous().view(groups, len(x) // groups, channels, -1), channels, 0)
    flat = x.movedim(1, -1).contiguous().view(groups, -1, channels)
    fold = 1
    while x.numel() > _SMALL and fold * channels < _ROW and flat.shape[1] % (2 * fold) == 0:
        fold *= 2
    return Rows(flat.view(groups, -1, fold * channels), channels, fold)


def unrows(values: Tensor, like: Tensor) -> Tensor:
    """Give values computed on `rows(like)` the shape and the layout of `like`, without a copy."""
    if like.dim() == 2 or not is_channels_last(like):
        return values.view(like.shape)
    spatial = like.shape[2:]
    return values.view(len(like), *spatial, like.shape[1]).movedim(-1, 1)


def observe(x: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance of each group and channel, (G, C), by two passes about the mean, and a buffer.

    The buffer has the shape of the values and is free: whoever needs one more of that size takes it instead of asking
    for new memory, whose first touch costs more than the arithmetic.
    """
    mean, scale = x.total(x.values) / x.positions, 1 / root_above(x.positions)
    buffer = torch.add(x.expand(mean * -scale), x.values, alpha=scale)
    return mean, x.total(buffer.square_()) / (x.positions * scale**2), buffer


def affine(x: Rows, scale: Tensor, shift: Tensor, buffer: Tensor) -> Tensor:
    """Return scale · x + shift, written into the buffer."""
    if x.fold:
        return torch.addcmul(x.expand(shift), x.values, x.expand(scale), out=buffer)
    # One constant per inner loop keeps the channels-first loops vectorized on the CPU; two do not.
    return torch.mul(x.values, x.expand(scale), out=buffer).add_(x.expand(shift))


def weighted_sums(gradient: Rows, x: Rows, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σ dy and Σ dy (x - centre) of each group and channel, (G, C), and a buffer that is free."""
    buffer = x.values - x.expand(centre)
    return gradient.total(gradient.values), gradient.total(buffer.mul_(gradient.values)), buffer


def affine_pair(gradient: Rows, x: Rows, coefficients: tuple[Tensor, Tensor, Tensor], buffer: Tensor) -> Tensor:
    """Return a · dy + b · x + c, written into the buffer."""
    a, b, c = coefficients
    return affine(x, b, c, buffer).addcmul_(gradient.values, x.expand(a))
