"""Functions of each value by itself: rectifiers in closed form and the largest of several, as in `cpu/pointwise.c`.

In float64, of which there is little: what cancels in them leaves nothing of float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bkn_core.ops.cuda.rows import (
    A_MEAN,
    B_MEAN,
    OUT_MEAN,
    PARAMETERS,
    TAPS,
    add,
    message,
    number,
    parameter,
    put_each_or_one,
    whole,
    write,
)

FLOOR = tl.constexpr(1e-12)
KEPT, NODES = tl.constexpr(4), tl.constexpr(81)


@triton.jit
def standard(mean, variance):
    """Return √v, Φ(a), Φ(-a) and φ(a) at a = m / √v."""
    deviation = tl.sqrt(tl.where(variance > FLOOR, variance, FLOOR))
    a = mean / deviation
    tail = tl.erf(a * 0.7071067811865476)
    return deviation, 0.5 + 0.5 * tail, 0.5 - 0.5 * tail, tl.exp(-0.5 * a * a) * 0.3989422804014327


@triton.jit
def positive(mean, variance):
    """Return √v, Φ(a), Φ(-a), φ(a), e(a) and the variance of max(X, 0)."""
    deviation, cdf, below, pdf = standard(mean, variance)
    a = mean / deviation
    above = pdf + a * cdf
    above = tl.where(above < 0, 0.0, above)
    rest = deviation * deviation * (cdf - above * (pdf - a * below))
    return deviation, cdf, below, pdf, above, tl.where(rest < 0, 0.0, rest)


@triton.jit
def wide(row, values, at, known):
    """Return the moments that an instruction reads, in float64; 1 where there are none."""
    mean, variance = message(row, A_MEAN, values, at, known)
    return mean.to(tl.float64), tl.where(known, variance.to(tl.float64), 1.0)


@triton.jit
def rectify(row, values, at, known):
    """Write the moments of max(X, 0)."""
    mean, variance = wide(row, values, at, known)
    deviation, _, _, _, above, rest = positive(mean, variance)
    write(row, values, at, known, (deviation * above).to(tl.float32), rest.to(tl.float32))


@triton.jit
def rectify_back(row, values, gradients, at, known, gm, gv):
    """Add to what max(X, 0) reads."""
    mean, variance = wide(row, values, at, known)
    deviation, cdf, below, pdf, above, _ = positive(mean, variance)
    to_mean = gm * cdf + 2 * gv * deviation * above * below
    to_variance = gv * (cdf - above * pdf) + 0.5 * gm * pdf / deviation
    to_variance = tl.where(variance >= FLOOR, to_variance, 0.0)
    add(row, A_MEAN, gradients, at, known, to_mean.to(tl.float32), to_variance.to(tl.float32))


@triton.jit
def largest(row, table, mean, deviation):
    """Return the moments of the largest of several, and their derivatives by m and √v as weights of two gradients.

    Points are a = -8 .. 8, their values f = a, or -m / √v below where they are rectified, with a slope of 0.
    """
    masses = table + tl.load(row + PARAMETERS + 3)
    kink = tl.where(number(row, 1) != 0, -mean / deviation, -1e300)
    nothing = tl.zeros(mean.shape, tl.float64)
    first, second, live, live_node, live_value, live_both = nothing, nothing, nothing, nothing, nothing, nothing
    for i in range(0, NODES):
        mass = tl.load(masses + i).to(tl.float64, bitcast=True)
        node = (nothing + (i - 40)) / 5.0
        value = tl.maximum(node, kink)
        slope = tl.where(node > kink, mass, 0.0)
        first += mass * value
        second += mass * value * value
        live += slope
        live_node += slope * node
        live_value += slope * value
        live_both += slope * node * value
    to_mean = 2 * deviation * (live_value - first * live)
    square = tl.maximum(second - first * first, 0.0)
    return first, square, live, live_node, to_mean, 2 * deviation * (live_both - first * live_node)


@triton.jit
def maximum(row, table, values, at, known):
    """Write the moments of the largest of several."""
    mean, variance = wide(row, values, at, known)
    deviation = tl.sqrt(tl.where(variance > FLOOR, variance, FLOOR))
    first, square, _, _, _, _ = largest(row, table, mean, deviation)
    square *= deviation * deviation
    write(row, values, at, known, (mean + deviation * first).to(tl.float32), square.to(tl.float32))


@triton.jit
def maximum_back(row, table, values, gradients, at, known, gm, gv):
    """Add to what the largest of several reads."""
    mean, variance = wide(row, values, at, known)
    deviation = tl.sqrt(tl.where(variance > FLOOR, variance, FLOOR))
    _, _, by_mean, by_deviation, square_by_mean, square_by_deviation = largest(row, table, mean, deviation)
    to_mean = gm * by_mean + gv * square_by_mean
    to_variance = (gm * by_deviation + gv * square_by_deviation) * 0.5 / deviation
    to_variance = tl.where(variance >= FLOOR, to_variance, 0.0)
    add(row, A_MEAN, gradients, at, known, to_mean.to(tl.float32), to_variance.to(tl.float32))


@triton.jit
def keep(row, values, at, known, variance, mean_slope, mean_edge, square_slope, square_edge):
    """Keep the derivatives of mean and variance: by the mean, and by √v, from which those by v follow."""
    by_variance = tl.where(variance >= FLOOR, 0.5 / tl.sqrt(tl.where(variance >= FLOOR, variance, 1.0)), 0.0)
    kept = values + tl.load(row + B_MEAN) + KEPT * at
    tl.store(kept, mean_slope.to(tl.float32), mask=known)
    tl.store(kept + 1, square_slope.to(tl.float32), mask=known)
    tl.store(kept + 2, (mean_edge * by_variance).to(tl.float32), mask=known)
    tl.store(kept + 3, (square_edge * by_variance).to(tl.float32), mask=known)


@triton.jit
def keep_back(row, values, gradients, at, known, gm, gv):
    """Add to what a function reads whose derivatives were kept."""
    kept = values + tl.load(row + B_MEAN) + KEPT * at
    to_mean = gm * tl.load(kept, mask=known, other=0.0) + gv * tl.load(kept + 1, mask=known, other=0.0)
    to_variance = gm * tl.load(kept + 2, mask=known, other=0.0) + gv * tl.load(kept + 3, mask=known, other=0.0)
    add(row, A_MEAN, gradients, at, known, to_mean, to_variance)


@triton.jit
def clip(row, values, at, known):
    """Write the moments of a value between two bounds: by the probability inside and the density cut off."""
    mean, variance = wide(row, values, at, known)
    lower = number(row, 0) - mean
    upper = number(row, 1) - mean
    deviation, a_cdf, a_below, a_pdf = standard(-lower, variance)
    _, b_cdf, b_below, b_pdf = standard(-upper, variance)
    inside = tl.where(lower > 0, a_cdf - b_cdf, b_below - a_below)
    edge = a_pdf - b_pdf
    first = lower * a_below + upper * b_cdf + deviation * edge
    moment = deviation * inside + lower * a_pdf - upper * b_pdf
    square = lower * lower * a_below + upper * upper * b_cdf + deviation * moment - first * first
    square = tl.where(square < 0, 0.0, square)
    write(row, values, at, known, (mean + first).to(tl.float32), square.to(tl.float32))
    by_mean = 2 * (deviation * edge - first * inside)
    keep(row, values, at, known, variance, inside, edge, by_mean, 2 * (moment - first * edge))


@triton.jit
def slope_of(row, at, known):
    """Return the slope below zero: of a parameter, or a number."""
    value = parameter(row, 0, at * whole(row, TAPS), known, 0.0).to(tl.float64)
    return tl.where(tl.load(row + PARAMETERS) != 0, value, number(row, 0))


@triton.jit
def leak(row, values, at, known):
    """Write the moments of max(X, 0) + s min(X, 0)."""
    mean, variance = wide(row, values, at, known)
    slope = slope_of(row, at, known)
    rest = 1 - slope
    deviation, cdf, below, pdf, above, rectified = positive(mean, variance)
    expected = slope * mean + rest * deviation * above
    square = slope * slope * deviation * deviation + rest * rest * rectified
    square += 2 * slope * rest * deviation * deviation * cdf
    write(row, values, at, known, expected.to(tl.float32), square.to(tl.float32))
    inner = deviation * above + slope * slope * (mean - deviation * above)
    level = slope + rest * cdf
    edge = rest * pdf
    by_deviation = 2 * (deviation * (cdf + slope * slope * below) - expected * edge)
    keep(row, values, at, known, variance, level, edge, 2 * (inner - expected * level), by_deviation)


@triton.jit
def leak_back(row, values, flat, at, known, gm, gv):
    """Write the gradient of a slope: the mean of min(X, 0) and its covariance with f."""
    mean, variance = wide(row, values, at, known)
    slope = slope_of(row, at, known)
    expected, _ = message(row, OUT_MEAN, values, at, known)
    deviation, _, below, pdf = standard(mean, variance)
    a = mean / deviation
    negative = deviation * (a * below - pdf)
    square = deviation * deviation * (below * (1 + a * a) - a * pdf)
    part = gm * negative + 2 * gv * (slope * square - expected * negative)
    put_each_or_one(row, flat, at, known, part.to(tl.float32))
