"""One layer forward: observe, blend with the prior, apply. The formulas stand in `ops/normalize.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from bkn_core.ops.cuda.tiles import limited, tile, tile_count


@triton.jit
def merge(count, mean, m2, more, other, other_m2):
    """Return count, mean and Σ (x - mean)² of two sets of values, the second of which may be empty.

    Reference:
        Chan, Golub and LeVeque 1983, eq. 2.1.
    """
    total = count + more
    share = tl.where(more > 0, more / tl.maximum(total, 1.0), 0.0)
    apart = other - mean
    return total, mean + apart * share, m2 + other_m2 + apart * apart * share * count


@triton.jit
def observe(
    x, group, part, parts, first, images, channels, length,
    CHANNELS_LAST: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return count, mean and Σ (x - mean)² of some channels, of every `parts`-th tile of a group."""
    count = tl.zeros([1], tl.float32)
    mean = tl.zeros([CHANNELS], tl.float32)
    m2 = tl.zeros([CHANNELS], tl.float32)
    x += group * images * channels * length
    for number in range(part, tile_count(images, length, CHANNELS_LAST, POSITIONS), parts):
        offsets, mask, held = tile(
            number, first, images, channels, length, CHANNELS_LAST, POSITIONS, CHANNELS
        )  # fmt: skip
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        more = held * 1.0
        centre = tl.sum(values, 0) / more
        apart = tl.where(mask, values - centre[None, :], 0.0)
        count, mean, m2 = merge(count, mean, m2, more, centre, tl.sum(apart * apart, 0))
    return count, mean, m2


@triton.jit
def blend(
    mean, m2, count, group, first, groups, channels, prior_mean, prior_variance, prior_stride, gain, weight, bias,
    statistics, eps, is_first,
    HAS_PRIOR: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, LARGEST: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return the factor, the mean and the offset of each channel; where `is_first`, write the statistics."""
    channel = first + tl.arange(0, CHANNELS)
    known = channel < channels
    observed, variance = mean, m2 / count
    rest = tl.where(count > 1, variance / tl.maximum(count - 1, 1.0), 0.0)
    posterior = variance
    if HAS_PRIOR:
        q = tl.load(gain)
        at = group * prior_stride + channel
        expected = tl.load(prior_mean + at, mask=known, other=0.0)
        predicted = tl.load(prior_variance + at, mask=known, other=1.0)
        d = observed - expected
        square = limited(d * d, LARGEST)
        mean = expected + q * d
        posterior = predicted + q * (limited(variance, LARGEST) - predicted + (1 - q) * square)
        rest = tl.where(q > 0, q * rest, 0.0)
    inverse = 1 / tl.sqrt(posterior + eps)
    at = group * channels + channel
    plane = groups * channels
    if is_first:
        tl.store(statistics + at, mean, mask=known)
        tl.store(statistics + plane + at, posterior, mask=known)
        tl.store(statistics + 2 * plane + at, observed, mask=known)
        tl.store(statistics + 3 * plane + at, variance, mask=known)
        tl.store(statistics + 4 * plane + at, posterior + rest, mask=known)
        tl.store(statistics + 5 * plane + at, inverse, mask=known)
    factor, offset = inverse, tl.zeros([CHANNELS], tl.float32)
    if HAS_WEIGHT:
        factor = inverse * tl.load(weight + channel, mask=known, other=0.0)
    if HAS_BIAS:
        offset = tl.load(bias + channel, mask=known, other=0.0)
    return factor, mean, offset


@triton.jit
def observe_parts(
    x, partial, images, channels, length, groups, parts,
    CHANNELS_LAST: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write count, mean and Σ (x - mean)² of each part of a group, (3, G, parts, C)."""
    first = tl.program_id(0) * CHANNELS
    row = tl.program_id(1)
    count, mean, m2 = observe(
        x, row // parts, row % parts, parts, first, images, channels, length, CHANNELS_LAST, POSITIONS, CHANNELS
    )  # fmt: skip
    channel = first + tl.arange(0, CHANNELS)
    known = channel < channels
    at, plane = row * channels + channel, groups * parts * channels
    tl.store(partial + at, count + tl.zeros([CHANNELS], tl.float32), mask=known)
    tl.store(partial + plane + at, mean, mask=known)
    tl.store(partial + 2 * plane + at, m2, mask=known)


@triton.jit
def merge_parts(partial, group, first, channels, groups, parts, CHANNELS: tl.constexpr):
    """Return count, mean and Σ (x - mean)² of a group from its parts."""
    channel = first + tl.arange(0, CHANNELS)
    known = channel < channels
    plane = groups * parts * channels
    count = tl.zeros([CHANNELS], tl.float32)
    mean = tl.zeros([CHANNELS], tl.float32)
    m2 = tl.zeros([CHANNELS], tl.float32)
    for part in range(0, parts):
        at = (group * parts + part) * channels + channel
        more = tl.load(partial + at, mask=known, other=1.0)
        centre = tl.load(partial + plane + at, mask=known, other=0.0)
        squares = tl.load(partial + 2 * plane + at, mask=known, other=0.0)
        count, mean, m2 = merge(count, mean, m2, more, centre, squares)
    return count, mean, m2


@triton.jit
def normalize(
    x, y, statistics, partial, prior_mean, prior_variance, prior_stride, gain, weight, bias, images, channels, length,
    groups, parts, eps,
    IS_WHOLE: tl.constexpr, HAS_PRIOR: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    LARGEST: tl.constexpr, CHANNELS_LAST: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Normalize some channels of one part of a group: observed here where it is whole, else from all of its parts."""
    first = tl.program_id(0) * CHANNELS
    row = tl.program_id(1)
    group, part = row // parts, row % parts
    if IS_WHOLE:
        count, mean, m2 = observe(
            x, group, 0, 1, first, images, channels, length, CHANNELS_LAST, POSITIONS, CHANNELS
        )  # fmt: skip
    else:
        count, mean, m2 = merge_parts(partial, group, first, channels, groups, parts, CHANNELS)
    factor, centre, offset = blend(
        mean, m2, count, group, first, groups, channels, prior_mean, prior_variance, prior_stride, gain, weight, bias,
        statistics, eps, part == 0, HAS_PRIOR, HAS_WEIGHT, HAS_BIAS, LARGEST, CHANNELS,
    )  # fmt: skip
    x += group * images * channels * length
    y += group * images * channels * length
    for number in range(part, tile_count(images, length, CHANNELS_LAST, POSITIONS), parts):
        offsets, mask, _ = tile(
            number, first, images, channels, length, CHANNELS_LAST, POSITIONS, CHANNELS
        )  # fmt: skip
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        result = (values - centre[None, :]) * factor[None, :] + offset[None, :]
        tl.store(y + offsets, result.to(y.dtype.element_ty), mask=mask)
