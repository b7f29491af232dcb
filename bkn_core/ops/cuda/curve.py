"""Moments of any function of each value by itself, by quadrature: `cpu/curve.c` says what the code of a function means.

A tile is some channels by all points. The levels of its stack are values that move, for registers have no number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bkn_core.ops.cuda.pointwise import FLOOR, keep
from bkn_core.ops.cuda.rows import A_MEAN, PARAMETERS, message, number, whole, write

NODES, POINTS = tl.constexpr(81), tl.constexpr(128)  # filled up with points of no mass
WIDTH = tl.constexpr(8)  # channels of a tile
POINT, NUMBER, COPY, SWAP, PLUS, TIMES, FACTOR, TERM = map(tl.constexpr, range(8))
ABOVE, BELOW, FROM, UPTO, SIGMOID, EXP, CDF, RECIPROCAL = map(tl.constexpr, range(8, 16))


@triton.jit
def curve(row, table, values, start, CHANNELS: tl.constexpr):
    """Write the moments of a function; of several independent values the largest."""
    masses = table + tl.load(row + PARAMETERS + 3)
    i = tl.arange(0, POINTS)[None, :]
    mass = tl.load(masses + i, mask=i < NODES, other=0).to(tl.float64, bitcast=True)
    node = tl.where(i < NODES, (i - 40) / 5.0, 0.0)
    for first in range(start, tl.minimum(start + CHANNELS, whole(row, 1)), WIDTH):
        at = first + tl.arange(0, WIDTH)
        known = at < whole(row, 1)
        mean, variance = message(row, A_MEAN, values, at, known)
        deviation = tl.sqrt(tl.where(variance > FLOOR, variance, FLOOR).to(tl.float32))
        f, slope = run_code(masses + NODES, mean[:, None] + deviation[:, None] * node)
        own = mass + tl.zeros(f.shape, tl.float64)
        if number(row, 0) != 1:
            own = of_largest(f, mass, i, number(row, 0))
        own = own.to(tl.float32)
        expected = tl.sum(own * f, 1)
        apart = f - expected[:, None]
        slope *= own
        write(row, values, at, known, expected, tl.sum(own * apart * apart, 1))
        by_mean, by_deviation = tl.sum(slope, 1), tl.sum(slope * node, 1)
        square_by_mean, square_by_deviation = tl.sum(2 * slope * apart, 1), tl.sum(2 * slope * apart * node, 1)
        keep(row, values, at, known, variance, by_mean, by_deviation, square_by_mean, square_by_deviation)


@triton.jit
def of_largest(f, mass, i, count):
    """Return the mass of each point as the largest of several: the power of all up to it, less that of those before."""
    upto = tl.zeros(f.shape, tl.float64)
    for j in range(0, NODES):
        other = tl.sum(tl.where(i == j, f, 0.0), 1)[:, None]
        upto += tl.where((other < f) | ((other == f) & (j <= i)), tl.sum(tl.where(i == j, mass, 0.0), 1)[:, None], 0.0)
    before = upto - mass
    upto = tl.exp(count * tl.log(tl.minimum(tl.maximum(upto, 1e-300), 1.0)))
    return upto - tl.exp(count * tl.log(tl.minimum(tl.maximum(before, 1e-300), 1.0)))


@triton.jit
def run_code(code, points):
    """Return values and slopes at points, of a stack's last level."""
    zero = tl.zeros(points.shape, tl.float32)
    v0, v1, v2, v3, v4, v5 = zero, zero, zero, zero, zero, zero
    s0, s1, s2, s3, s4, s5 = zero, zero, zero, zero, zero, zero
    for i in range(0, whole(code, 0)):
        what = tl.load(code + 1 + 2 * i).to(tl.int32)
        given = tl.load(code + 2 + 2 * i).to(tl.float64, bitcast=True).to(tl.float32)
        if what <= COPY:
            v5, v4, v3, v2, v1 = v4, v3, v2, v1, v0
            s5, s4, s3, s2, s1 = s4, s3, s2, s1, s0
            if what == POINT:
                v0, s0 = points, zero + 1
            elif what == NUMBER:
                v0, s0 = zero + given, zero
        elif what == SWAP:
            v0, s0, v1, s1 = v1, s1, v0, s0
        elif what <= TIMES:
            if what == PLUS:
                v0, s0 = v1 + v0, s1 + s0
            else:
                v0, s0 = v1 * v0, s1 * v0 + s0 * v1
            v1, v2, v3, v4 = v2, v3, v4, v5
            s1, s2, s3, s4 = s2, s3, s4, s5
        else:
            v0, s0 = apply(what, given, v0, s0)
    return v0, s0


@triton.jit
def apply(what, given, v, s):
    """Return value and slope of a function of the last level."""
    if what == FACTOR:
        v, s = v * given, s * given
    elif what == TERM:
        v += given
    elif what == RECIPROCAL:
        v = 1 / v
        s *= -v * v
    elif what >= SIGMOID:
        v, s = exponential(what, given, v, s)
    else:
        above, below = (what == ABOVE) | (what == FROM), (what == BELOW) | (what == UPTO)
        is_inside = (above & (v > given)) | (below & (v < given))
        is_inside = is_inside | (((what == FROM) | (what == UPTO)) & (v == given))
        v, s = tl.where(is_inside, v, given), tl.where(is_inside, s, 0.0)
    return v, s


@triton.jit
def exponential(what, far, v, s):
    """Return value and slope of σ, exp and Φ, whose exponents are held so far from 0."""
    if what == SIGMOID:
        v = 1 / (1 + tl.exp(tl.minimum(tl.maximum(-v, -far), far)))
        s *= v * (1 - v)
    elif what == EXP:
        v = tl.exp(tl.minimum(tl.maximum(v, -far), far))
        s *= v
    else:
        s *= tl.exp(tl.maximum(-0.5 * v * v, -far)) * 0.3989422804014327
        v = 0.5 + 0.5 * tl.erf(v * 0.7071067811865476)
    return v, s
