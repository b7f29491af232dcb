"""One layer, forward and backward, on a GPU: two operators of PyTorch, which compilation takes as they are.

A group whose tiles are few is observed and normalized by one launch; larger ones are divided into parts, and a second
launch merges them. The backward pass takes one launch or three likewise. Not run on a GPU: tested by Triton's
interpreter, and compiled ahead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from bkn_core.filter.inflation_gradient import LARGEST_RATIO, USUAL, own_part
from bkn_core.ops.activation_rows import is_channels_last
from bkn_core.ops.cuda import backward, forward

LARGEST = 0.499 * torch.finfo(torch.float32).max  # squares stay below, so that two of them are a number
LARGEST_GRADIENT = 1e30  # of the gain by one channel of one group
VECTORS = 64  # channels of a program that has nothing to do with activations
_FEW_TILES = 24  # that one program goes through without help

LIBRARY = torch.library.Library("bkn_cuda", "DEF")
LIBRARY.define(
    "normalize(Tensor x, Tensor? prior_mean, Tensor? prior_variance, Tensor gain, Tensor? weight, Tensor? bias,"
    " float eps, int groups) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "normalize_backward(Tensor dy, Tensor? to_statistics, Tensor x, Tensor? prior_mean, Tensor? prior_variance,"
    " Tensor gain, Tensor? weight, Tensor statistics, Tensor? sensitivity, Tensor(a!)? gathered, float eps, int groups)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class Division(NamedTuple):
    """How an activation is divided over programs.

    Args:
        groups, images, channels, length: statistics groups, images in each, channels, positions of an image.
        is_last: channels last.
        positions, wide: of a tile, along positions and channels.
        parts: of each group, one for each program.
    """

    groups: int
    images: int
    channels: int
    length: int
    is_last: bool
    positions: int
    wide: int
    parts: int

    @property
    def blocks(self) -> int:
        """Tiles along the channels."""
        return -(-self.channels // self.wide)

    @property
    def tiles(self) -> int:
        """Tiles along the positions of one group."""
        if self.is_last:
            return -(-self.images * self.length // self.positions)
        return self.images * -(-self.length // self.positions)

    @property
    def constants(self) -> dict[str, int | bool]:
        """What kernels are compiled for."""
        return {"CHANNELS_LAST": self.is_last, "POSITIONS": self.positions, "CHANNELS": self.wide}

    @classmethod
    def of(cls, x: Tensor, groups: int) -> Division:
        """Divide an activation: tiles of as many values as registers hold, long in the direction in which memory is."""
        channels, positions = x.shape[1], x.shape[2:].numel()
        is_last = x.dim() == 2 or is_channels_last(x)
        if is_last:
            wide = min(64, triton.next_power_of_2(channels))
            tall = min(1024 // wide, triton.next_power_of_2(len(x) // groups * positions))
        else:
            tall = min(512, triton.next_power_of_2(positions))
            wide = min(max(1, 256 // tall), triton.next_power_of_2(channels))
        whole = cls(groups, len(x) // groups, channels, positions, is_last, tall, wide, 1)
        wanted = 4 * _processors(x.device) // max(1, groups * whole.blocks)
        if whole.tiles <= _FEW_TILES or wanted <= 1:
            return whole
        return whole._replace(parts=min(wanted, whole.tiles // 4))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _stride(prior_mean: Tensor | None) -> int:
    return 0 if prior_mean is None or prior_mean.dim() == 1 else prior_mean.shape[-1]


def normalize(
    x: Tensor,
    prior_mean: Tensor | None,
    prior_variance: Tensor | None,
    gain: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Return y and the statistics (6, G, C) of `ops/normalize.py`.

    Args:
        x: activation, dense in one of the layouts, float32, float16 or bfloat16; all else is float32 and contiguous.
        prior_mean, prior_variance: µ', v', (C,) or (G, C), or None.
        gain: q.
        weight, bias: γ, β or None.
        eps: ε.
        groups: G, of equal size.
    """
    cut = Division.of(x, groups)
    y, statistics = torch.empty_like(x), gain.new_empty((6, groups, cut.channels))
    grid, sizes = (cut.blocks, groups * cut.parts), (cut.images, cut.channels, cut.length, groups, cut.parts)
    partial = statistics
    if cut.parts > 1:
        partial = gain.new_empty((3, groups, cut.parts, cut.channels))
        forward.observe_parts[grid](x, partial, *sizes, **cut.constants)
    forward.normalize[grid](
        x, y, statistics, partial, prior_mean, prior_variance, _stride(prior_mean), gain, weight, bias, *sizes, eps,
        IS_WHOLE=cut.parts == 1, HAS_PRIOR=prior_mean is not None, HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None, LARGEST=LARGEST, **cut.constants,
    )  # fmt: skip
    return y, statistics


def normalize_backward(
    dy: Tensor,
    to_statistics: Tensor | None,
    x: Tensor,
    prior_mean: Tensor | None,
    prior_variance: Tensor | None,
    gain: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    sensitivity: Tensor | None,
    gathered: Tensor | None,
    eps: float,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, γ, β, µ', v' and, for each channel, of the gain; empty where there is none.

    Args:
        dy, to_statistics: gradients of y, in the type of x, and of the statistics.
        x, prior_mean, prior_variance, gain, weight, statistics: what `normalize` took and gave.
        sensitivity, gathered: h̄, and the sums that are added to; None to follow no inflation.
        eps, groups: as there.
    """
    cut = Division.of(x, groups)
    if dy.stride() != x.stride() or dy.dtype is not x.dtype:
        dy = torch.empty_like(x).copy_(dy)
    if to_statistics is not None:
        to_statistics = to_statistics.contiguous()
    dx, vector = torch.empty_like(x), gain.new_empty(cut.channels)
    to_weight = torch.empty_like(vector) if weight is not None else vector[:0]
    to_gain, to_prior = vector[:0], [vector[:0], vector[:0]]
    if prior_mean is not None:
        to_gain, to_prior = torch.empty_like(vector), [torch.empty_like(prior_mean) for _ in range(2)]
    sums = gain.new_empty((2, groups, cut.parts, cut.channels))
    coefficients = gain.new_empty((4, groups, cut.channels))
    is_whole = cut.parts == 1 and groups * cut.tiles <= _FEW_TILES
    parts, vectors = (cut.blocks, groups * cut.parts), cut._replace(wide=VECTORS)
    steps = [(cut, (cut.blocks, 1), (True, True, True))] if is_whole else [
        (cut, parts, (True, False, False)),
        (vectors, (vectors.blocks, 1), (False, True, False)),
        (cut, parts, (False, False, True)),
    ]  # fmt: skip
    for division, grid, (sums_up, makes_vectors, applies) in steps:
        backward.normalize_backward[grid](
            x, dy, dx, statistics, to_statistics, sums, coefficients, prior_mean, prior_variance, _stride(prior_mean),
            gain, weight, sensitivity, gathered, float(own_part(len(x))), *to_prior, to_gain, to_weight, vector,
            cut.images, cut.channels, cut.length, groups, cut.parts, float(cut.images * cut.length), eps,
            SUMS=sums_up, VECTORS=makes_vectors, APPLIES=applies,
            HAS_PRIOR=prior_mean is not None, HAS_WEIGHT=weight is not None, HAS_STATISTICS=to_statistics is not None,
            FOLLOWS=prior_mean is not None and gathered is not None, LARGEST=LARGEST, LARGEST_GRADIENT=LARGEST_GRADIENT,
            RATIO=LARGEST_RATIO, USUAL=USUAL, **division.constants,
        )  # fmt: skip
    return dx, to_weight, vector, to_prior[0], to_prior[1], to_gain


def _normalize_shapes(x, prior_mean, prior_variance, gain, weight, bias, eps, groups):
    return torch.empty_like(x), gain.new_empty((6, groups, x.shape[1]))


def _backward_shapes(
    dy, to_statistics, x, prior_mean, prior_variance, gain, weight, statistics, sensitivity, gathered, eps, groups
):
    vector, none = gain.new_empty(x.shape[1]), gain.new_empty(0)
    priors = [none, none] if prior_mean is None else [torch.empty_like(prior_mean) for _ in range(2)]
    return (
        torch.empty_like(x), none if weight is None else torch.empty_like(vector), vector, *priors,
        none if prior_mean is None else torch.empty_like(vector),
    )  # fmt: skip


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Launch kernels where the first tensor is, whichever GPU is the current one."""

    def launched(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device_of(first):
            return launch(first, *rest)

    return launched


for _device in ("CUDA", "CPU"):  # on the CPU Triton's interpreter serves
    LIBRARY.impl("normalize", on_its_device(normalize), _device)
    LIBRARY.impl("normalize_backward", on_its_device(normalize_backward), _device)
torch.library.register_fake("bkn_cuda::normalize", _normalize_shapes, lib=LIBRARY)
torch.library.register_fake("bkn_cuda::normalize_backward", _backward_shapes, lib=LIBRARY)
