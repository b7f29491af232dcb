"""One layer backward: two sums, the small arithmetic of each channel, one affine pass. The formulas stand in
`ops/normalize.py`, what follows the inflations in `filter/inflation_gradient.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bkn_core.ops.cuda.inflation import follow
from bkn_core.ops.cuda.tiles import limited, tile, tile_count


@triton.jit
def write_sums(
    x, dy, statistics, sums, group, part, parts, first, images, channels, length, groups,
    CHANNELS_LAST: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write Σ dy and Σ dy (x - µ̂) of some channels, of every `parts`-th tile of a group, (2, G, parts, C)."""
    channel = first + tl.arange(0, CHANNELS)
    known = channel < channels
    centre = tl.load(statistics + group * channels + channel, mask=known, other=0.0)
    total = tl.zeros([CHANNELS], tl.float32)
    weighted = tl.zeros([CHANNELS], tl.float32)
    start = tl.cast(group, tl.int64) * images * channels * length  # in 32 bits some forms spill registers
    x += start
    dy += start
    for number in range(part, tile_count(images, length, CHANNELS_LAST, POSITIONS), parts):
        offsets, mask, _ = tile(
            number, first, images, channels, length, CHANNELS_LAST, POSITIONS, CHANNELS
        )  # fmt: skip
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) - centre[None, :]
        gradient = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(gradient, 0)
        weighted += tl.sum(gradient * tl.where(mask, values, 0.0), 0)
    at = (group * parts + part) * channels + channel
    tl.store(sums + at, total, mask=known)
    tl.store(sums + groups * parts * channels + at, weighted, mask=known)


@triton.jit
def sum_of_parts(sums, group, parts, channels, channel, known):
    """Return the sum of a group over its parts."""
    total = tl.zeros(channel.shape, tl.float32)
    for part in range(0, parts):
        total += tl.load(sums + (group * parts + part) * channels + channel, mask=known, other=0.0)
    return total


@triton.jit
def differentiate_group(
    sums, statistics, to_statistics, prior_mean, prior_variance, prior_stride, q, weight, group, first, channels,
    groups, parts,
    HAS_PRIOR: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_STATISTICS: tl.constexpr, LARGEST: tl.constexpr,
    LARGEST_GRADIENT: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return what one group gives: to γ, β, µ', v', the gain, x̄ and S; γ r; x̄ - µ', S and v' of the prior."""
    channel = first + tl.arange(0, CHANNELS)
    known = channel < channels
    plane, at = groups * channels, group * channels + channel
    total = sum_of_parts(sums, group, parts, channels, channel, known)
    weighted = sum_of_parts(sums + groups * parts * channels, group, parts, channels, channel, known)
    inverse = tl.load(statistics + 5 * plane + at, mask=known, other=1.0)
    scale = inverse
    if HAS_WEIGHT:
        scale = inverse * tl.load(weight + channel, mask=known, other=0.0)
    gm = -scale * total
    gv = -0.5 * scale * inverse * inverse * weighted
    if HAS_STATISTICS:
        gm += tl.load(to_statistics + at, mask=known, other=0.0)
        gv += tl.load(to_statistics + plane + at, mask=known, other=0.0)
    observed = tl.load(statistics + 2 * plane + at, mask=known, other=0.0)
    to_mean, to_variance = gm, gv
    prior_to_mean, prior_to_variance = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    to_gain, predicted, apart = prior_to_mean, prior_to_mean, prior_to_mean
    variance = limited(tl.load(statistics + 3 * plane + at, mask=known, other=1.0), LARGEST)
    if HAS_PRIOR:
        prior = group * prior_stride + channel
        predicted = tl.load(prior_variance + prior, mask=known, other=1.0)
        apart = observed - tl.load(prior_mean + prior, mask=known, other=0.0)
        p = 1 - q
        cross = 2 * p * q * gv * apart
        square = limited(apart * apart, LARGEST)
        prior_to_mean = p * gm - cross
        prior_to_variance = p * gv
        by_variance = gv * (variance - predicted + (p - q) * square)
        to_gain = gm * apart - limited(-limited(by_variance, LARGEST_GRADIENT), LARGEST_GRADIENT)
        to_mean = q * gm + cross
        to_variance = q * gv
    return (
        inverse * weighted, total, prior_to_mean, prior_to_variance, to_gain, to_mean, to_variance, scale, observed,
        apart, variance, predicted,
    )  # fmt: skip


@triton.jit
def totals(
    sums, statistics, to_statistics, prior_mean, prior_variance, prior_stride, q, weight, first, channels, groups,
    parts,
    HAS_PRIOR: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_STATISTICS: tl.constexpr, LARGEST: tl.constexpr,
    LARGEST_GRADIENT: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return the sums over groups of what goes to γ, β, µ', v', the gain and ι, and the means of S + d² and v'."""
    by_weight = tl.zeros([CHANNELS], tl.float32)
    by_bias, by_mean, by_variance, by_gain = by_weight, by_weight, by_weight, by_weight
    by_ratio, spread, expected = by_weight, by_weight, by_weight
    for group in range(0, groups):
        (g_weight, g_bias, g_mean, g_variance, g_gain, _, _, _, _, apart, variance, predicted) = differentiate_group(
            sums, statistics, to_statistics, prior_mean, prior_variance, prior_stride, q, weight, group, first,
            channels, groups, parts, HAS_PRIOR, HAS_WEIGHT, HAS_STATISTICS, LARGEST, LARGEST_GRADIENT, CHANNELS,
        )  # fmt: skip
        by_weight += g_weight
        by_bias += g_bias
        by_mean += g_mean
        by_variance += g_variance
        by_gain += g_gain
        by_ratio += g_variance * predicted
        spread += (variance + limited(apart * apart, LARGEST)) / groups
        expected += predicted / groups
    return by_weight, by_bias, by_mean, by_variance, by_gain, by_ratio, spread, expected


@triton.jit
def write_rows(pointers, plane, a, b, c, d, known):
    """Write four rows, a plane apart."""
    tl.store(pointers, a, mask=known)
    tl.store(pointers + plane, b, mask=known)
    tl.store(pointers + 2 * plane, c, mask=known)
    tl.store(pointers + 3 * plane, d, mask=known)


@triton.jit
def differentiate(
    sums, statistics, to_statistics, prior_mean, prior_variance, prior_stride, gain, weight, sensitivity, gathered,
    own_part, coefficients, to_prior_mean, to_prior_variance, to_gain, to_weight, to_bias, first, channels, groups,
    parts, count, eps,
    HAS_PRIOR: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_STATISTICS: tl.constexpr, FOLLOWS: tl.constexpr,
    LARGEST: tl.constexpr, LARGEST_GRADIENT: tl.constexpr, RATIO: tl.constexpr, USUAL: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of all vectors, and of each group the four numbers that make dx, (4, G, C)."""
    channel = first + tl.arange(0, CHANNELS)
    known, plane = channel < channels, groups * channels
    q = tl.load(gain) if HAS_PRIOR else 1.0
    by_weight, by_bias, by_mean, by_variance, by_gain, by_ratio, spread, expected = totals(
        sums, statistics, to_statistics, prior_mean, prior_variance, prior_stride, q, weight, first, channels, groups,
        parts, HAS_PRIOR, HAS_WEIGHT, HAS_STATISTICS, LARGEST, LARGEST_GRADIENT, CHANNELS,
    )  # fmt: skip
    expected += eps
    nothing = tl.zeros([CHANNELS], tl.float32)
    largest = RATIO * expected
    share, push, step = nothing, nothing, nothing
    if FOLLOWS:
        share, push, step = follow(
            statistics, prior_mean, prior_stride, sensitivity, gathered, own_part, by_ratio, by_mean, spread, expected,
            channel, channels, groups, eps, LARGEST, RATIO, USUAL, CHANNELS,
        )  # fmt: skip
    for group in range(0, groups):
        (_, _, g_mean, g_variance, _, to_mean, to_variance, scale, observed, apart, variance, _) = differentiate_group(
            sums, statistics, to_statistics, prior_mean, prior_variance, prior_stride, q, weight, group, first,
            channels, groups, parts, HAS_PRIOR, HAS_WEIGHT, HAS_STATISTICS, LARGEST, LARGEST_GRADIENT, CHANNELS,
        )  # fmt: skip
        at, shift = group * channels + channel, nothing
        if FOLLOWS:
            own = variance + limited(apart * apart, LARGEST)
            portion = tl.where(own > largest, share * largest / own, share)
            shift = push + 2 * portion * apart
            to_mean, to_variance = to_mean + shift, to_variance + portion
            by_mean, by_variance = by_mean - shift, by_variance - step
        write_rows(coefficients + at, plane, scale, 2 * to_variance / count, observed, to_mean / count, known)
        if HAS_PRIOR:
            tl.store(to_prior_mean + at, g_mean - shift, mask=known & (prior_stride > 0))
            tl.store(to_prior_variance + at, g_variance - step, mask=known & (prior_stride > 0))
    tl.store(to_bias + channel, by_bias, mask=known)
    if HAS_WEIGHT:
        tl.store(to_weight + channel, by_weight, mask=known)
    if HAS_PRIOR:
        tl.store(to_gain + channel, by_gain, mask=known)
        is_shared = known & (prior_stride == 0)
        tl.store(to_prior_mean + channel, by_mean, mask=is_shared)
        tl.store(to_prior_variance + channel, by_variance, mask=is_shared)


@triton.jit
def write_gradient(
    x, dy, dx, coefficients, group, part, parts, first, images, channels, length, groups,
    CHANNELS_LAST: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write dx of one part of a group."""
    channel = first + tl.arange(0, CHANNELS)
    known = channel < channels
    at, plane = group * channels + channel, groups * channels
    scale = tl.load(coefficients + at, mask=known, other=0.0)
    slope = tl.load(coefficients + plane + at, mask=known, other=0.0)
    centre = tl.load(coefficients + 2 * plane + at, mask=known, other=0.0)
    offset = tl.load(coefficients + 3 * plane + at, mask=known, other=0.0)
    start = tl.cast(group, tl.int64) * images * channels * length
    x += start
    dy += start
    dx += start
    for number in range(part, tile_count(images, length, CHANNELS_LAST, POSITIONS), parts):
        offsets, mask, _ = tile(
            number, first, images, channels, length, CHANNELS_LAST, POSITIONS, CHANNELS
        )  # fmt: skip
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
        result = scale[None, :] * gradient + slope[None, :] * (values - centre[None, :]) + offset[None, :]
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def normalize_backward(
    x, dy, dx, statistics, to_statistics, sums, coefficients, prior_mean, prior_variance, prior_stride, gain, weight,
    sensitivity, gathered, own_part, to_prior_mean, to_prior_variance, to_gain, to_weight, to_bias, images, channels,
    length, groups, parts, count, eps,
    SUMS: tl.constexpr, VECTORS: tl.constexpr, APPLIES: tl.constexpr, HAS_PRIOR: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_STATISTICS: tl.constexpr, FOLLOWS: tl.constexpr, LARGEST: tl.constexpr, LARGEST_GRADIENT: tl.constexpr,
    RATIO: tl.constexpr, USUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr, POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Do one of the three steps for a part of a group, or all of them for some channels of all groups."""
    first = tl.program_id(0) * CHANNELS
    row = tl.program_id(1)
    IS_WHOLE: tl.constexpr = SUMS and VECTORS
    if SUMS:
        if IS_WHOLE:
            for group in range(0, groups):
                write_sums(
                    x, dy, statistics, sums, group, 0, 1, first, images, channels, length, groups, CHANNELS_LAST,
                    POSITIONS, CHANNELS,
                )  # fmt: skip
            tl.debug_barrier()
        else:
            write_sums(
                x, dy, statistics, sums, row // parts, row % parts, parts, first, images, channels, length, groups,
                CHANNELS_LAST, POSITIONS, CHANNELS,
            )  # fmt: skip
    if VECTORS:
        differentiate(
            sums, statistics, to_statistics, prior_mean, prior_variance, prior_stride, gain, weight, sensitivity,
            gathered, own_part, coefficients, to_prior_mean, to_prior_variance, to_gain, to_weight, to_bias, first,
            channels, groups, parts, count, eps, HAS_PRIOR, HAS_WEIGHT, HAS_STATISTICS, FOLLOWS, LARGEST,
            LARGEST_GRADIENT, RATIO, USUAL, CHANNELS,
        )  # fmt: skip
    if APPLIES:
        if IS_WHOLE:
            tl.debug_barrier()
            for group in range(0, groups):
                write_gradient(
                    x, dy, dx, coefficients, group, 0, 1, first, images, channels, length, groups, CHANNELS_LAST,
                    POSITIONS, CHANNELS,
                )  # fmt: skip
        else:
            write_gradient(
                x, dy, dx, coefficients, row // parts, row % parts, parts, first, images, channels, length, groups,
                CHANNELS_LAST, POSITIONS, CHANNELS,
            )  # fmt: skip
