"""The autograd node of all priors: what `native_program.NativeProgram` lists, run by the CPU kernels in two calls."""

from __future__ import annotations

import array
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bkn_core.norm import native

FIELDS = 23  # of a line in `program.h`


class Program(Protocol):
    """The lines, and how their arena is divided."""

    names: tuple[str, ...]
    widths: list[int]
    moving: set[int]
    size: int
    results: int

    def structure(self, tensors: list[Tensor | None], gradients: list[Tensor | None]) -> array.array[int]:
        """Return the lines as the kernels read them."""


class Evaluate(torch.autograd.Function):
    """All priors and gains as one node, from parameters and buffers to means, then variances, then gains."""

    @staticmethod
    def forward(ctx: Any, program: Program, *tensors: Tensor) -> tuple[Tensor, ...]:
        values = torch.empty(program.size)
        _call("bkn_evaluate", program.structure(list(tensors), []), values, None)
        ctx.program = program
        ctx.save_for_backward(values, *(None if i in program.moving else tensor for i, tensor in enumerate(tensors)))
        priors = program.results - len(program.names)
        gains = values[priors : program.results].unbind()
        return *torch.split(values[:priors], 2 * program.widths), *gains

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *results: Tensor) -> tuple[Tensor | None, ...]:
        program: Program = ctx.program
        values, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        gradients = [torch.empty_like(t) if w and t is not None else None for t, w in zip(tensors, wanted, strict=True)]
        arena = torch.zeros(program.size)
        priors, count = program.results - len(program.names), 2 * len(program.widths)
        if count:
            torch.cat(results[:count], out=arena[:priors])
        torch.stack(results[count:], out=arena[priors : program.results])
        _call("bkn_reverse", program.structure(tensors, gradients), values, arena)
        return None, *gradients


def _call(kernel: str, lines: array.array[int], values: Tensor, gradients: Tensor | None) -> None:
    address, length = lines.buffer_info()
    slots = [length // FIELDS, torch.get_num_threads(), values.data_ptr()]
    native.run(kernel, [*slots, 0 if gradients is None else gradients.data_ptr(), address])
