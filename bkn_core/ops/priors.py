"""The autograd node of all priors: what `kernel_program.KernelProgram` lists, run by the CPU kernels in two calls."""

from __future__ import annotations

import array
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bkn_core.filter.autograd import once_differentiable
from bkn_core.ops import kernels

FIELDS, ACCUMULATES = 23, 12  # of an instruction in `program.h`, and the number of one of them


class Program(Protocol):
    """The instructions, and how their arena is divided."""

    moving: set[int]
    size: int
    results: int

    def structure(self, tensors: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> array.array[int]:
        """Return the instructions as the kernels read them."""


def run(instructions: array.array[int], values: Tensor) -> None:
    """Run the instructions and write their arena."""
    _call("bkn_evaluate", instructions, values, None)


class RunProgram(torch.autograd.Function):
    """All priors and gains as one node, from parameters and buffers to one row of results."""

    @staticmethod
    def forward(ctx: Any, program: Program, *tensors: Tensor) -> Tensor:
        values = torch.empty(program.size)
        run(program.structure(tensors, []), values)
        ctx.program = program
        ctx.save_for_backward(values, *(None if i in program.moving else tensor for i, tensor in enumerate(tensors)))
        return values[: program.results]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], results: Tensor) -> tuple[Tensor | None, ...]:
        values, *tensors = saved
        wanted = ctx.needs_input_grad[1:]
        gradients = [torch.empty_like(t) if w and t is not None else None for t, w in zip(tensors, wanted, strict=True)]
        arena = torch.zeros(ctx.program.size)
        arena[: ctx.program.results] = results
        _call("bkn_reverse", ctx.program.structure(tensors, gradients), values, arena)
        return None, *gradients


def _call(kernel: str, instructions: array.array[int], values: Tensor, gradients: Tensor | None) -> None:
    address, length = instructions.buffer_info()
    slots = [length // FIELDS, torch.get_num_threads(), values.data_ptr()]
    kernels.run(kernel, [*slots, 0 if gradients is None else gradients.data_ptr(), address])
