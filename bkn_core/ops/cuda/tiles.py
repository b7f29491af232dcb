"""How a kernel walks over the activation of a statistics group: tiles of positions by channels, in either layout.

Channels first, (N, C, L), a tile lies in one image; channels last, (N, L, C), the positions of a group follow each
other.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_count(images, length, CHANNELS_LAST: tl.constexpr, POSITIONS: tl.constexpr):
    """Return the number of tiles along the positions of one group."""
    if CHANNELS_LAST:
        return tl.cdiv(images * length, POSITIONS)
    else:
        return images * tl.cdiv(length, POSITIONS)


@triton.jit
def tile(
    number, first, images, channels, length,
    CHANNELS_LAST: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return offsets in a group and mask of a tile, (POSITIONS, CHANNELS), and how many positions it holds."""
    channel = first + tl.arange(0, CHANNELS)
    if CHANNELS_LAST:
        start = number * POSITIONS
        limit = images * length
        position = start + tl.arange(0, POSITIONS)
        offsets = position[:, None] * channels + channel[None, :]
    else:
        wide = tl.cdiv(length, POSITIONS)
        start = number % wide * POSITIONS
        limit = length
        position = start + tl.arange(0, POSITIONS)
        offsets = (number // wide * channels + channel)[None, :] * length + position[:, None]
    mask = (position < limit)[:, None] & (channel < channels)[None, :]
    return offsets, mask, tl.minimum(limit - start, POSITIONS)


@triton.jit
def limited(value, largest):
    """Return a value that is not above a bound; NaN as it is."""
    return tl.where(value > largest, largest, value)
