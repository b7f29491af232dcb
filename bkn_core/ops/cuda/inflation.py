"""What follows the inflations in a layer's backward pass. The formulas stand in `filter/inflation_gradient.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from bkn_core.ops.cuda.tiles import limited


@triton.jit
def finite(value):
    """Whether a number is neither infinite nor NaN."""
    return value - value == 0


@triton.jit
def add(pointers, values, mask):
    """Add to what lies there."""
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + values, mask=mask)


@triton.jit
def usual(sensitivity, channels, USUAL: tl.constexpr, CHANNELS: tl.constexpr):
    """Return by how much a sensitivity may differ from its running mean: so many times its root mean square."""
    squares = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        running = tl.load(sensitivity + channel, mask=channel < channels, other=0.0)
        squares += running * running
    return USUAL * tl.sqrt(tl.sum(squares, 0, keep_dims=True) / channels)


@triton.jit
def used(sensitivity, seen, own_part, channel, channels, USUAL: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the sensitivity of the passes before, and of this one's what is beyond the usual."""
    running = tl.load(sensitivity + channel, mask=channel < channels, other=0.0)
    bound = usual(sensitivity, channels, USUAL, CHANNELS)
    surplus = seen - running
    beyond = surplus - tl.where(surplus > bound, bound, tl.where(surplus < -bound, -bound, surplus))
    return tl.where((bound > 0) & finite(seen), running + own_part * beyond, running)


@triton.jit
def follow(
    statistics, prior_mean, prior_stride, sensitivity, gathered, own_part, by_ratio, by_mean, spread, expected, channel,
    channels, groups, eps,
    LARGEST: tl.constexpr, RATIO: tl.constexpr, USUAL: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return what the inflations' gradient gives each group's spread, the mean, and v'; gather what this pass saw."""
    known, plane = channel < channels, groups * channels
    largest = RATIO * expected
    pull = tl.zeros([CHANNELS], tl.float32) + eps
    for group in range(0, groups):
        at, prior = group * channels + channel, group * prior_stride + channel
        apart = tl.load(statistics + 2 * plane + at, mask=known, other=0.0)
        apart -= tl.load(prior_mean + prior, mask=known, other=0.0)
        variance = limited(tl.load(statistics + 3 * plane + at, mask=known, other=1.0), LARGEST)
        pull += limited(variance + limited(apart * apart, LARGEST), largest) / groups
    wide = (spread + eps) / RATIO
    deviation = tl.sqrt(tl.where(wide > expected, wide, expected))
    push = by_mean * deviation
    sound = known & finite(by_ratio) & finite(push)
    add(gathered + channel, by_ratio, sound)
    add(gathered + channels + channel, push, sound)
    add(gathered + 2 * channels + channel, tl.zeros([CHANNELS], tl.float32) + 1.0, sound)
    share = used(sensitivity, by_ratio, own_part, channel, channels, USUAL, CHANNELS) / groups / expected
    push = used(sensitivity + channels, push, own_part, channel, channels, USUAL, CHANNELS) / groups / deviation
    return share, push, share * pull / expected
