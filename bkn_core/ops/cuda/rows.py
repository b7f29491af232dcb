"""What the kernels of all priors read and write of an instruction: its row in the table, messages, parameters."""

from __future__ import annotations

import triton
import triton.language as tl

from bkn_core.ops.cuda import layout

OUT_MEAN, A_MEAN, B_MEAN, INPUTS = map(tl.constexpr, (layout.OUT_MEAN, layout.A_MEAN, layout.B_MEAN, layout.INPUTS))
TAPS, GROUPS, IS_LAST, PARTS = map(tl.constexpr, (layout.TAPS, layout.GROUPS, layout.IS_LAST, layout.PARTS))
PARAMETERS, GRADIENTS, NUMBERS = map(tl.constexpr, (layout.PARAMETERS, layout.GRADIENTS, layout.NUMBERS))
SCRATCH, FIELDS = tl.constexpr(layout.SCRATCH), tl.constexpr(layout.FIELDS)
CONVOLUTION, TRANSPOSED = tl.constexpr(layout.CONVOLUTION), tl.constexpr(layout.TRANSPOSED)


@triton.jit
def whole(row, FIELD: tl.constexpr):
    """Return a field that is small."""
    return tl.load(row + FIELD).to(tl.int32)


@triton.jit
def number(row, WHICH: tl.constexpr):
    """Return one of the two doubles."""
    return tl.load(row + NUMBERS + WHICH).to(tl.float64, bitcast=True)


@triton.jit
def parameter(row, WHICH: tl.constexpr, at, known, other):
    """Return values of a parameter, `other` where there is none."""
    address = tl.load(row + PARAMETERS + WHICH)
    return tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=known & (address != 0), other=other)


@triton.jit
def put(row, WHICH: tl.constexpr, flat, at, known, gradient):
    """Write the gradient of a parameter where one is wanted."""
    start = tl.load(row + GRADIENTS + WHICH)
    tl.store(flat + start + at, gradient, mask=known & (start >= 0))


@triton.jit
def put_each_or_one(row, flat, at, known, gradient):
    """Write the gradient of a number for each channel; of one for all, add to that of the channels before."""
    if whole(row, TAPS) != 0:
        put(row, 0, flat, at, known, gradient)
    else:
        first = tl.min(at, 0)
        target = flat + tl.load(row + GRADIENTS)
        is_wanted = tl.load(row + GRADIENTS) >= 0
        tl.debug_barrier()
        before = tl.load(target, mask=is_wanted & (first > 0), other=0.0)
        tl.debug_barrier()
        tl.store(target, before + tl.sum(tl.where(known, gradient, 0.0), 0), mask=is_wanted)


@triton.jit
def message(row, SLOT: tl.constexpr, values, at, known):
    """Return mean and variance at a slot."""
    mean = tl.load(values + tl.load(row + SLOT) + at, mask=known, other=0.0)
    return mean, tl.load(values + tl.load(row + SLOT + 1) + at, mask=known, other=0.0)


@triton.jit
def write(row, values, at, known, mean, variance):
    """Write the result."""
    tl.store(values + tl.load(row + OUT_MEAN) + at, mean, mask=known)
    tl.store(values + tl.load(row + OUT_MEAN + 1) + at, variance, mask=known)


@triton.jit
def add(row, SLOT: tl.constexpr, gradients, at, known, to_mean, to_variance):
    """Add to the gradients of a slot."""
    mean = gradients + tl.load(row + SLOT) + at
    variance = gradients + tl.load(row + SLOT + 1) + at
    tl.store(mean, tl.load(mean, mask=known, other=0.0) + to_mean, mask=known)
    tl.store(variance, tl.load(variance, mask=known, other=0.0) + to_variance, mask=known)
