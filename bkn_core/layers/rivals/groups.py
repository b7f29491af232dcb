"""What normalizations with a memory share: groups of images in a row, and recurrences over them without a loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.filter.kalman import group_images

LENGTH = 20_000  # statistics groups of a training whose length nobody has told


class Rival(_BatchNorm):
    """A layer with population statistics whose warm-up is a part of the training's length.

    `length` counts the statistics groups of a whole training, `num_batches_tracked` those that were seen.
    """

    kind: ClassVar[str]
    length = LENGTH

    def folded(self, affine: Callable[[], nn.Module]) -> nn.Module:
        """Return what the layer is in evaluation mode, given what makes the affine map of γ, β and its statistics."""
        return affine()

    def seen(self, groups: int) -> Tensor:
        """Return the number of each of the next groups of a training, from 1: (groups, 1)."""
        assert self.num_batches_tracked is not None
        return self.num_batches_tracked + torch.arange(1, groups + 1, device=self.num_batches_tracked.device)[:, None]


def set_length_(model: nn.Module, groups: int) -> None:
    """Tell layers with a warm-up, in place, how many statistics groups the whole training will show them.

    Args:
        model: a converted model.
        groups: forward passes times groups in a pass.
    """
    for module in model.modules():
        if isinstance(module, Rival):
            module.length = groups


def wide(x: Tensor) -> Tensor:
    """Return a tensor in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def exactly(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Multiply matrices of statistics in their own precision for a while, whatever surrounds it."""
    kind = x.device.type
    is_mixed = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_mixed else contextlib.nullcontext()


def positions(x: Tensor) -> tuple[int, ...]:
    """Return the dimensions of a tensor behind images and channels."""
    return tuple(range(2, x.dim()))


def image_means(values: Tensor) -> Tensor:
    """Average over positions: (N, C, *spatial) -> (N, C)."""
    return values.mean(positions(values)) if values.dim() > 2 else values


def spread(rows: Tensor, x: Tensor) -> Tensor:
    """Lay (N, C) or (1, C) out so that it broadcasts against an activation."""
    return rows.view(*rows.shape, *([1] * (x.dim() - 2)))


def group_means(rows: Tensor, statistics_batch_size: int | None) -> Tensor:
    """Average the rows of the images of each statistics group: (N, C) -> (G, C)."""
    sizes = group_images(len(rows), statistics_batch_size)
    body = sizes.count(sizes[0]) * sizes[0]
    means = rows[:body].reshape(-1, sizes[0], *rows.shape[1:]).mean(1)
    return means if body == len(rows) else torch.cat([means, rows[body:].mean(0, keepdim=True)])


def recurrence(factors: Tensor, increments: Tensor, start: Tensor) -> Tensor:
    """Return the states a_0 .. a_N of a linear recurrence, in log N operations on all of them.

        a_{n+1} = f_n a_n + b_n

    Args:
        factors: f.
        increments: b.
        start: a_0.

    Shape:
        factors, increments (N, C), start (C,) -> (N + 1, C).
    """
    factors, increments = torch.cat([torch.zeros_like(factors[:1]), factors]), torch.cat([start[None], increments])
    reach = 1
    while reach < len(factors):
        later, earlier = factors[reach:], slice(None, -reach)
        increments = torch.cat([increments[:reach], increments[reach:] + later * increments[earlier]])
        factors = torch.cat([factors[:reach], later * factors[earlier]])
        reach *= 2
    return increments


def moving_average(values: Tensor, decay: float, start: Tensor) -> Tensor:
    """Return the moving averages before each value and after the last: a_{n+1} = decay · a_n + (1 - decay) · v_n."""
    return recurrence(torch.full_like(values, decay), (1 - decay) * values, start)
