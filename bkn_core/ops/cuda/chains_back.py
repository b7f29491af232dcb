"""The way back through a chain of instructions, see `chains.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from bkn_core.ops.cuda.chains import (
    ADD,
    CLIPPED,
    COLLECT,
    CURVE,
    GAIN,
    GATHER,
    GIVEN,
    LEAKY,
    MAX_POOL,
    MULTIPLY,
    NORM,
    REFINE,
    RELU,
    SHIFT,
    gain,
    slope_and_shift,
)
from bkn_core.ops.cuda.pointwise import keep_back, leak_back, maximum_back, rectify_back
from bkn_core.ops.cuda.rows import (
    A_MEAN,
    B_MEAN,
    FIELDS,
    GROUPS,
    INPUTS,
    IS_LAST,
    OUT_MEAN,
    PARAMETERS,
    PARTS,
    SCRATCH,
    TAPS,
    add,
    message,
    number,
    parameter,
    put,
    put_each_or_one,
    whole,
)


@triton.jit(do_not_specialize=["chains"])
def reverse(table, values, gradients, flat, scratch, chains, CHANNELS: tl.constexpr):
    """Differentiate one chain, from its last instruction to its first."""
    bounds = table + chains + tl.program_id(0)
    first, last = whole(bounds, 0), whole(bounds, 1)
    for i in range(first, last):
        row = table + (first + last - 1 - i) * FIELDS
        reach = whole(row, 1)
        if whole(row, 0) == GATHER:
            reach = whole(row, INPUTS)
        for start in range(0, reach, CHANNELS):
            operation = whole(row, 0)
            at = start + tl.arange(0, CHANNELS)
            known = at < whole(row, 1)
            gm, gv = message(row, OUT_MEAN, gradients, at, known)
            if (operation == NORM) | (operation == GAIN):
                begin_back(row, operation, flat, at, known, gm, gv)
            elif (operation == ADD) | (operation == MULTIPLY):
                combine_back(row, operation, values, gradients, at, known, gm, gv)
            elif operation == RELU:
                rectify_back(row, values, gradients, at, known, gm, gv)
            elif operation == REFINE:
                refine_back(row, values, gradients, flat, at, known, gm, gv)
            elif operation == GATHER:
                gather_back(row, table, gradients, at)
            elif operation == COLLECT:
                collect(row, gradients, scratch, at, known)
            elif operation == MAX_POOL:
                maximum_back(row, table, values, gradients, at, known, gm, gv)
            elif (operation == CURVE) | (operation == CLIPPED) | (operation == LEAKY):
                keep_back(row, values, gradients, at, known, gm, gv)
                if operation == LEAKY:
                    leak_back(row, values, flat, at, known, gm, gv)
            elif operation != GIVEN:
                scale_back(row, operation, values, gradients, flat, at, known, gm, gv)
        tl.debug_barrier()


@triton.jit
def begin_back(row, operation, flat, at, known, gm, gv):
    """Write the gradients of what depends on parameters only."""
    if operation == NORM:
        put(row, 0, flat, at, known, 2 * gv * parameter(row, 0, at, known, 0.0))
        put(row, 1, flat, at, known, gm)
    else:
        _, slope = gain(row, at, known)
        put(row, 0, flat, at, known, gm * slope * parameter(row, 1, at, known, 0.0))


@triton.jit
def combine_back(row, operation, values, gradients, at, known, gm, gv):
    """Add to what a sum or a product reads, which may be the same twice."""
    am, av = message(row, A_MEAN, values, at, known)
    bm, bv = message(row, B_MEAN, values, at, known)
    if operation == ADD:
        add(row, A_MEAN, gradients, at, known, gm, gv)
        tl.debug_barrier()
        add(row, B_MEAN, gradients, at, known, gm, gv)
    else:
        add(row, A_MEAN, gradients, at, known, gm * bm + 2 * gv * bv * am, gv * (bv + bm * bm))
        tl.debug_barrier()
        add(row, B_MEAN, gradients, at, known, gm * am + 2 * gv * av * bm, gv * (av + am * am))


@triton.jit
def refine_back(row, values, gradients, flat, at, known, gm, gv):
    """Write the gradients of a refined prior; the inflation is a constant."""
    _, variance = message(row, A_MEAN, values, at, known)
    factor = tl.load(values + tl.load(row + B_MEAN) + at, mask=known, other=0.0)
    deviation = tl.sqrt(variance + number(row, 0).to(tl.float32))
    put(row, 0, flat, at, known, gm * deviation)
    put(row, 1, flat, at, known, gv * variance * factor)
    to_variance = gv * factor + 0.5 * gm * parameter(row, 0, at, known, 0.0) / deviation
    add(row, A_MEAN, gradients, at, known, gm, to_variance)


@triton.jit
def gather_back(row, table, gradients, at):
    """Add to each channel what all the places give that it was taken to."""
    known = at < whole(row, INPUTS)
    starts = table + tl.load(row + PARAMETERS + 3) + whole(row, 1)
    places = starts + whole(row, INPUTS) + 1
    first = tl.load(starts + at, mask=known, other=0)
    last = tl.load(starts + at + 1, mask=known, other=0)
    to_mean = tl.zeros(at.shape, tl.float32)
    to_variance = tl.zeros(at.shape, tl.float32)
    for i in range(0, whole(row, PARTS)):
        is_one = known & (first + i < last)
        place = tl.load(places + first + i, mask=is_one, other=0)
        gm, gv = message(row, OUT_MEAN, gradients, place, is_one)
        to_mean += gm
        to_variance += gv
    add(row, A_MEAN, gradients, at, known, to_mean, to_variance)


@triton.jit
def collect(row, gradients, scratch, at, known):
    """Add to each channel what the columns of a weight give that read it, in all parts of its rows."""
    taps = whole(row, TAPS)
    inner = whole(row, INPUTS) // whole(row, GROUPS)
    is_last = whole(row, IS_LAST) != 0
    total = whole(row, INPUTS) * taps
    column = at // inner * inner * taps + tl.where(is_last, at % inner, at % inner * taps)
    step = tl.where(is_last, inner, 1)
    to_mean = tl.zeros(at.shape, tl.float32)
    to_variance = tl.zeros(at.shape, tl.float32)
    for part in range(0, whole(row, PARTS)):
        sums = scratch + tl.load(row + SCRATCH) + 2 * part * total
        for tap in range(0, taps):
            to_mean += tl.load(sums + column + tap * step, mask=known, other=0.0)
            to_variance += tl.load(sums + total + column + tap * step, mask=known, other=0.0)
    add(row, A_MEAN, gradients, at, known, to_mean, to_variance)


@triton.jit
def scale_back(row, operation, values, gradients, flat, at, known, gm, gv):
    """Add to what an affine map reads, and write its parameter's gradient."""
    mean, variance = message(row, A_MEAN, values, at, known)
    slope, square, _ = slope_and_shift(row, operation, at, known)
    add(row, A_MEAN, gradients, at, known, (gm * slope).to(tl.float32), (gv * square).to(tl.float32))
    by_slope = (gm * mean + 2 * gv * variance * slope).to(tl.float32)
    put_each_or_one(row, flat, at, known, tl.where(operation == SHIFT, gm, by_slope))
