"""All priors of a model, what reads weights: a launch takes all those of a level.

    mean_o = b_o + Σ_j W_oj m_j,   var_o = Σ_j W_oj² v_j    (`propagate.convolution`)
    mean_o = b_o + Σ_j W_oj p_j,   var_o = Σ_jk W_oj P_jk W_ok    (`propagate.patches`)

Columns j of a weight are input channels and taps, in the order of its memory. A weight is read once in each direction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bkn_core.ops.cuda.rows import (
    A_MEAN,
    CONVOLUTION,
    FIELDS,
    GRADIENTS,
    GROUPS,
    INPUTS,
    IS_LAST,
    OUT_MEAN,
    PARAMETERS,
    SCRATCH,
    TAPS,
    TRANSPOSED,
    message,
    parameter,
    put,
    whole,
    write,
)
from bkn_core.ops.cuda.transposed import transpose, transpose_back


@triton.jit(do_not_specialize=["tiles"])
def weigh(table, values, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Compute some rows of a weight, of patches one; which of which stands at `tiles`."""
    tile = table + tiles + 2 * tl.program_id(0)
    row = table + tl.load(tile) * FIELDS
    if whole(row, 0) == CONVOLUTION:
        convolve(row, values, whole(tile, 1), ROWS, COLUMNS)
    elif whole(row, 0) == TRANSPOSED:
        transpose(row, table, values, whole(tile, 1), ROWS, COLUMNS)
    else:
        see_patches(row, values, whole(tile, 1), COLUMNS)


@triton.jit
def channel_of(column, inner, taps, is_last):
    """Return the input channel of a column."""
    return tl.where(is_last, column % inner, column // taps)


@triton.jit
def convolve(row, values, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Compute some rows of a convolution."""
    taps, groups, is_last = whole(row, TAPS), whole(row, GROUPS), whole(row, IS_LAST) != 0
    inner, per_group = whole(row, INPUTS) // groups, whole(row, 1) // groups
    width = inner * taps
    o = first + tl.arange(0, ROWS)
    known = o < whole(row, 1)
    mean = tl.zeros([ROWS, COLUMNS], tl.float32)
    variance = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        mask = known[:, None] & (j < width)[None, :]
        w = parameter(row, 0, o[:, None] * width + j[None, :], mask, 0.0)
        at = (o // per_group * inner)[:, None] + channel_of(j, inner, taps, is_last)[None, :]
        m, v = message(row, A_MEAN, values, at, mask)
        mean += w * m
        variance += w * w * v
    write(row, values, o, known, tl.sum(mean, 1) + parameter(row, 1, o, known, 0.0), tl.sum(variance, 1))


@triton.jit
def patch_weights(row, o, j, known):
    """Return a row of a weight in the order of a patch: channels, and taps in them."""
    width, taps = whole(row, INPUTS), whole(row, TAPS)
    inner = width // taps
    at = tl.where(whole(row, IS_LAST) != 0, j % taps * inner + j // taps, j)
    return at, parameter(row, 0, o * width + at, known, 0.0)


@triton.jit
def times_covariance(row, o, j, COLUMNS: tl.constexpr):
    """Return some columns of W P; of P only the diagonal may be known."""
    width = whole(row, INPUTS)
    covariance = tl.load(row + PARAMETERS + 3).to(tl.pointer_type(tl.float32))
    known = j < width
    product = tl.zeros([COLUMNS], tl.float32)
    if whole(row, GROUPS) == 0:
        w = patch_weights(row, o, j, known)[1]
        product += w * tl.load(covariance + j, mask=known, other=0.0)
    else:
        for start in range(0, width, 32):
            i = start + tl.arange(0, 32)
            w = patch_weights(row, o, i, i < width)[1]
            mask = (i < width)[:, None] & known[None, :]
            block = tl.load(covariance + i[:, None] * width + j[None, :], mask=mask, other=0.0)
            product += tl.sum(w[:, None] * block, 0)
    return product


@triton.jit
def see_patches(row, values, o, COLUMNS: tl.constexpr):
    """Compute one row of a convolution whose input patches have a known mean and covariance."""
    width = whole(row, INPUTS)
    mean = tl.zeros([COLUMNS], tl.float32)
    variance = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        w = patch_weights(row, o, j, j < width)[1]
        mean += w * parameter(row, 2, j, j < width, 0.0)
        variance += w * times_covariance(row, o, j, COLUMNS)
    known = o >= 0
    total = tl.sum(variance, 0)
    write(row, values, o, known, tl.sum(mean, 0) + parameter(row, 1, o, known, 0.0), tl.where(total < 0, 0.0, total))


@triton.jit(do_not_specialize=["tiles"])
def weigh_back(
    table, values, gradients, flat, scratch, tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Differentiate columns of one part of a convolution's rows, inputs of a transposed one, a row of patches."""
    tile = table + tiles + 3 * tl.program_id(0)
    row = table + tl.load(tile) * FIELDS
    first = whole(tile, 1)
    if whole(row, 0) == CONVOLUTION:
        convolve_back(row, values, gradients, flat, scratch, first, whole(tile, 2), ROWS, COLUMNS, PART)
    elif whole(row, 0) == TRANSPOSED:
        transpose_back(row, table, values, gradients, flat, scratch, first, COLUMNS, ROWS)
    else:
        see_patches_back(row, values, gradients, flat, first, COLUMNS)


@triton.jit
def convolve_back(
    row, values, gradients, flat, scratch, first, part, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr
):
    """Write the gradients of W and b, and the sums of columns for `chains_back.collect`."""
    taps, groups, is_last = whole(row, TAPS), whole(row, GROUPS), whole(row, IS_LAST) != 0
    inner, per_group = whole(row, INPUTS) // groups, whole(row, 1) // groups
    width, total = inner * taps, whole(row, INPUTS) * taps
    column = first + tl.arange(0, COLUMNS)
    known = column < total
    j = column % width
    m, v = message(row, A_MEAN, values, column // width * inner + channel_of(j, inner, taps, is_last), known)
    to_mean = tl.zeros([ROWS, COLUMNS], tl.float32)
    to_variance = tl.zeros([ROWS, COLUMNS], tl.float32)
    last = tl.minimum(part * PART + PART, per_group)
    for start in range(part * PART, last, ROWS):
        r = start + tl.arange(0, ROWS)
        o = (column // width * per_group)[None, :] + r[:, None]
        mask = known[None, :] & (r < last)[:, None]
        at = o * width + j[None, :]
        w = parameter(row, 0, at, mask, 0.0)
        gm, gv = message(row, OUT_MEAN, gradients, o, mask)
        to_mean += gm * w
        to_variance += gv * w * w
        put(row, 0, flat, at, mask, gm * m[None, :] + 2 * gv * w * v[None, :])
        put(row, 1, flat, o, mask & (j == 0)[None, :], gm)
    sums = scratch + tl.load(row + SCRATCH) + 2 * part * total
    tl.store(sums + column, tl.sum(to_mean, 0), mask=known)
    tl.store(sums + total + column, tl.sum(to_variance, 0), mask=known)


@triton.jit
def see_patches_back(row, values, gradients, flat, o, COLUMNS: tl.constexpr):
    """Write the gradients of one row of W and of b."""
    width = whole(row, INPUTS)
    known = o >= 0
    gm, gv = message(row, OUT_MEAN, gradients, o, known)
    variance = message(row, OUT_MEAN, values, o, known)[1]
    gv = tl.where(variance > 0, 2 * gv, 0.0)
    put(row, 1, flat, o, known, gm)
    if tl.load(row + GRADIENTS) >= 0:
        for start in range(0, width, COLUMNS):
            j = start + tl.arange(0, COLUMNS)
            at = patch_weights(row, o, j, j < width)[0]
            gradient = gm * parameter(row, 2, j, j < width, 0.0) + gv * times_covariance(row, o, j, COLUMNS)
            put(row, 0, flat, o * width + at, j < width, gradient)
