"""Transposed convolutions among the weights of a level, see `weights.py`.

The weight (I, O / groups, taps) has a row for each input. Taps t that reach one phase f of the stride belong together:

    A_of = Σ_i m_i Σ_t W_iot,   B_of = Σ_i v_i Σ_t W_iot²
    mean_o = mean over f of A_of + b_o,   var_o = mean over f of B_of + variance over f of A_of
"""

from __future__ import annotations

import triton
import triton.language as tl

from bkn_core.ops.cuda.rows import (
    A_MEAN,
    B_MEAN,
    GROUPS,
    INPUTS,
    IS_LAST,
    OUT_MEAN,
    PARAMETERS,
    PARTS,
    SCRATCH,
    TAPS,
    message,
    parameter,
    put,
    whole,
    write,
)


@triton.jit
def of_phase(row, table, values, o, known, phase, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return A and B of some outputs at one phase."""
    taps, groups, is_last = whole(row, TAPS), whole(row, GROUPS), whole(row, IS_LAST) != 0
    inner, per_group = whole(row, INPUTS) // groups, whole(row, 1) // groups
    mean = tl.zeros([ROWS, COLUMNS], tl.float32)
    variance = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tap in range(0, taps):
        if tl.load(table + tl.load(row + PARAMETERS + 3) + tap) == phase:
            column = tl.where(is_last, tap * per_group + o % per_group, o % per_group * taps + tap)
            for start in range(0, inner, COLUMNS):
                j = start + tl.arange(0, COLUMNS)
                mask = known[:, None] & (j < inner)[None, :]
                i = (o // per_group * inner)[:, None] + j[None, :]
                w = parameter(row, 0, i * (per_group * taps) + column[:, None], mask, 0.0)
                m, v = message(row, A_MEAN, values, i, mask)
                mean += w * m
                variance += w * w * v
    return tl.sum(mean, 1), tl.sum(variance, 1)


@triton.jit
def transpose(row, table, values, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Compute some outputs, and keep how far A of each phase is from its mean."""
    o = first + tl.arange(0, ROWS)
    known = o < whole(row, 1)
    phases = whole(row, PARTS)
    kept = values + tl.load(row + B_MEAN) + o * phases
    mean = tl.zeros([ROWS], tl.float32)
    variance = tl.zeros([ROWS], tl.float32)
    for phase in range(0, phases):
        a, b = of_phase(row, table, values, o, known, phase, ROWS, COLUMNS)
        tl.store(kept + phase, a, mask=known)
        variance += b
        apart = a - mean
        mean += apart / (phase + 1)
        variance += apart * (a - mean)
    tl.debug_barrier()
    for phase in range(0, phases):
        tl.store(kept + phase, tl.load(kept + phase, mask=known, other=0.0) - mean, mask=known)
    write(row, values, o, known, mean + parameter(row, 1, o, known, 0.0), variance / phases)


@triton.jit
def transpose_back(
    row, table, values, gradients, flat, scratch, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Write the gradients of W and b of some inputs, and the sums for `chains_back.collect`."""
    taps, groups, is_last = whole(row, TAPS), whole(row, GROUPS), whole(row, IS_LAST) != 0
    inner, per_group = whole(row, INPUTS) // groups, whole(row, 1) // groups
    phases = whole(row, PARTS)
    i = first + tl.arange(0, ROWS)
    known = i < whole(row, INPUTS)
    m, v = message(row, A_MEAN, values, i, known)
    to_mean = tl.zeros([ROWS, COLUMNS], tl.float32)
    to_variance = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, per_group * taps, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        is_one = j < per_group * taps
        tap = tl.where(is_last, j // per_group, j % taps)
        o = (i // inner * per_group)[:, None] + tl.where(is_last, j % per_group, j // taps)[None, :]
        mask = known[:, None] & is_one[None, :]
        phase = tl.load(table + tl.load(row + PARAMETERS + 3) + tap, mask=is_one, other=0)
        apart = tl.load(values + tl.load(row + B_MEAN) + o * phases + phase[None, :], mask=mask, other=0.0)
        gm, gv = message(row, OUT_MEAN, gradients, o, mask)
        at = i[:, None] * (per_group * taps) + j[None, :]
        w = parameter(row, 0, at, mask, 0.0)
        to_a, to_b = (gm + 2 * gv * apart) / phases, gv / phases
        to_mean += to_a * w
        to_variance += to_b * w * w
        put(row, 0, flat, at, mask, to_a * m[:, None] + 2 * to_b * w * v[:, None])
        put(row, 1, flat, o, mask & (i % inner == 0)[:, None] & (tap == 0)[None, :], gm)
    sums = scratch + tl.load(row + SCRATCH)
    tl.store(sums + i, tl.sum(to_mean, 1), mask=known)
    tl.store(sums + whole(row, INPUTS) + i, tl.sum(to_variance, 1), mask=known)
