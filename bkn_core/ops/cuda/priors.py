"""All priors of a model on a GPU as one autograd node: two launches for each level of weights, and one.

Not run on a GPU: tested by Triton's interpreter, and compiled ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bkn_core.filter.autograd import once_differentiable
from bkn_core.ops.cuda import layout
from bkn_core.ops.cuda.chains import evaluate
from bkn_core.ops.cuda.chains_back import reverse
from bkn_core.ops.cuda.layout import Level, Table
from bkn_core.ops.cuda.weights import weigh, weigh_back


class _Schedule(Protocol):
    levels: list[Level]
    scratch: int


class Program(Protocol):
    """The instructions, and how their arena is divided; `places` are those of the tensors that are given."""

    schedule: _Schedule
    moving: set[int]
    places: list[slice]
    size: int
    results: int

    def table(self, tensors: Sequence[Tensor | None], wanted: Sequence[bool], device: torch.device) -> Table:
        """Return the instructions in the memory where the tensors are."""


class RunOnGPU(torch.autograd.Function):
    """All priors and gains as one node, from parameters and buffers to one row of results."""

    @staticmethod
    def forward(ctx: Any, program: Program, device: torch.device, *tensors: Tensor) -> Tensor:
        """Run all levels."""
        ctx.wanted = [tensor.requires_grad for tensor in tensors]
        values = torch.empty(program.size, device=device)
        given = tensors[: len(program.places)]
        if given:
            torch._foreach_copy_([values[place] for place in program.places], given)
        with torch.cuda.device_of(values):
            run(program.schedule.levels, program.table(tensors, ctx.wanted, device).numbers, values)
        ctx.program = program
        ctx.save_for_backward(values, *(None if i in program.moving else tensor for i, tensor in enumerate(tensors)))
        return values[: program.results]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], results: Tensor) -> tuple[Tensor | None, ...]:
        """Run them back, and part the gradients."""
        values, *tensors = saved
        program = ctx.program
        table = program.table(tensors, ctx.wanted, values.device)
        gradients = values.new_zeros(program.size)
        gradients[: program.results] = results
        flat, scratch = values.new_empty(table.size), values.new_empty(program.schedule.scratch)
        with torch.cuda.device_of(values):
            run_back(program.schedule.levels, table.numbers, values, gradients, flat, scratch)
        found: list[Tensor | None] = [None] * len(tensors)
        for i, place in enumerate(program.places):
            found[i] = gradients[place]
        for i, start in table.uses:
            tensor, before = tensors[i], found[i]
            part = flat.as_strided(tensor.shape, tensor.stride(), start)
            found[i] = part if before is None else before + part  # of a parameter that is used more than once
        return None, None, *found


def run(levels: Sequence[Level], table: Tensor, values: Tensor) -> None:
    """Write the arena."""
    for (chains, count), (tiles, weights), _ in levels:
        if count:
            evaluate[(count,)](table, values, chains, CHANNELS=layout.CHANNELS, num_warps=layout.WARPS)
        if weights:
            weigh[(weights,)](table, values, tiles, ROWS=layout.ROWS, COLUMNS=layout.COLUMNS)


def run_back(
    levels: Sequence[Level], table: Tensor, values: Tensor, gradients: Tensor, flat: Tensor, scratch: Tensor
) -> None:
    """Write the gradients of the arena and of the parameters.

    Args:
        levels: of the program.
        table: of the instructions.
        values: the arena.
        gradients: of the arena, zero but for those of the results.
        flat: for the gradients of the parameters.
        scratch: for sums of columns.
    """
    more = {"ROWS": layout.ROWS_BACK, "COLUMNS": layout.COLUMNS_BACK, "PART": layout.ROWS_OF_PART}
    for (chains, count), _, (tiles, weights) in reversed(levels):
        if weights:
            weigh_back[(weights,)](table, values, gradients, flat, scratch, tiles, **more)
        if count:
            reverse[(count,)](
                table, values, gradients, flat, scratch, chains, CHANNELS=layout.CHANNELS, num_warps=layout.WARPS
            )
