"""All priors of a model, what works channel by channel: one program walks over a chain of instructions, tile by tile.

`filter/propagate.py` says what each does, `cpu/program.c` says the same in C. The chains of a launch share no value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bkn_core.ops.cuda import layout
from bkn_core.ops.cuda.curve import curve
from bkn_core.ops.cuda.pointwise import clip, leak, maximum, rectify
from bkn_core.ops.cuda.rows import (
    A_MEAN,
    B_MEAN,
    FIELDS,
    PARAMETERS,
    TAPS,
    message,
    number,
    parameter,
    whole,
    write,
)

NORM, GIVEN, RELU, ADD = map(tl.constexpr, (layout.NORM, layout.GIVEN, layout.RELU, layout.ADD))
MULTIPLY, AFFINE, GATHER, REFINE = map(tl.constexpr, (layout.MULTIPLY, layout.AFFINE, layout.GATHER, layout.REFINE))
AVERAGE, MAX_POOL, GAIN, CLIPPED = map(tl.constexpr, (layout.AVERAGE, layout.MAX_POOL, layout.GAIN, layout.CLIPPED))
LEAKY, SCALE, SHIFT, COLLECT = map(tl.constexpr, (layout.LEAKY, layout.SCALE, layout.SHIFT, layout.COLLECT))
CURVE = tl.constexpr(layout.CURVE)


@triton.jit(do_not_specialize=["chains"])
def evaluate(table, values, chains, CHANNELS: tl.constexpr):
    """Compute the values of one chain, whose first row and the one after its last stand at `chains`."""
    bounds = table + chains + tl.program_id(0)
    for i in range(whole(bounds, 0), whole(bounds, 1)):
        row = table + i * FIELDS
        for start in range(0, whole(row, 1), CHANNELS):
            operation = whole(row, 0)
            at = start + tl.arange(0, CHANNELS)
            known = at < whole(row, 1)
            if (operation == NORM) | (operation == GIVEN) | (operation == GAIN):
                begin(row, operation, values, at, known)
            elif (operation == ADD) | (operation == MULTIPLY):
                combine(row, operation, values, at, known)
            elif operation == RELU:
                rectify(row, values, at, known)
            elif operation == REFINE:
                refine(row, values, at, known)
            elif operation == GATHER:
                gather(row, table, values, at, known)
            elif operation == MAX_POOL:
                maximum(row, table, values, at, known)
            elif operation == CURVE:
                curve(row, table, values, start, CHANNELS)
            elif operation == CLIPPED:
                clip(row, values, at, known)
            elif operation == LEAKY:
                leak(row, values, at, known)
            elif operation != COLLECT:
                scale(row, operation, values, at, known)
        tl.debug_barrier()


@triton.jit
def begin(row, operation, values, at, known):
    """Write what depends on parameters only: β and γ² of a layer, known moments, a gain."""
    if operation == NORM:
        weight = parameter(row, 0, at, known, 1.0)
        write(row, values, at, known, parameter(row, 1, at, known, 0.0), weight * weight)
    elif operation == GIVEN:
        mean = parameter(row, 0, at, known, 0.0)
        write(row, values, at, known, mean, parameter(row, 1, at * whole(row, TAPS), known, 0.0))
    else:
        value, _ = gain(row, at, known)
        value = value * parameter(row, 1, at, known, 0.0)
        write(row, values, at, known, value, value)


@triton.jit
def gain(row, at, known):
    """Return the gain before it is scheduled, and its slope by its parameter."""
    value = parameter(row, 0, at, known, 0.0)
    sigmoid = 1 / (1 + tl.exp(-value))
    is_learned = number(row, 0) != 0
    return tl.where(is_learned, sigmoid, value), tl.where(is_learned, sigmoid * (1 - sigmoid), 1.0)


@triton.jit
def combine(row, operation, values, at, known):
    """Write a sum or a product."""
    am, av = message(row, A_MEAN, values, at, known)
    bm, bv = message(row, B_MEAN, values, at, known)
    if operation == ADD:
        write(row, values, at, known, am + bm, av + bv)
    else:
        write(row, values, at, known, am * bm, av * bv + av * bm * bm + bv * am * am)


@triton.jit
def refine(row, values, at, known):
    """Write a refined prior, and keep the factor of its variance: the inflation moves before the backward pass."""
    mean, variance = message(row, A_MEAN, values, at, known)
    offset = parameter(row, 0, at, known, 0.0) + parameter(row, 3, at, known, 0.0)
    factor = tl.exp(parameter(row, 1, at, known, 0.0) + parameter(row, 2, at, known, 0.0))
    tl.store(values + tl.load(row + B_MEAN) + at, factor, mask=known)
    mean += offset * tl.sqrt(variance + number(row, 0).to(tl.float32))
    write(row, values, at, known, mean, variance * factor)


@triton.jit
def gather(row, table, values, at, known):
    """Write channels picked, repeated or reordered."""
    index = tl.load(table + tl.load(row + PARAMETERS + 3) + at, mask=known, other=0)
    mean, variance = message(row, A_MEAN, values, index, known)
    write(row, values, at, known, mean, variance)


@triton.jit
def slope_and_shift(row, operation, at, known):
    """Return factors of mean and variance and a shift, of numbers or of a parameter."""
    value = parameter(row, 0, at * whole(row, TAPS), known, 0.0).to(tl.float64)
    slope = tl.where(operation == SCALE, value, tl.where(operation == AFFINE, number(row, 0), 1.0))
    shift = tl.where(operation == SHIFT, value, tl.where(operation == AFFINE, number(row, 1), 0.0))
    return slope, tl.where(operation == AVERAGE, number(row, 0), slope * slope), shift


@triton.jit
def scale(row, operation, values, at, known):
    """Write an affine map, or an average, which is one but for its variance."""
    mean, variance = message(row, A_MEAN, values, at, known)
    slope, square, shift = slope_and_shift(row, operation, at, known)
    write(row, values, at, known, (mean * slope + shift).to(tl.float32), (variance * square).to(tl.float32))
