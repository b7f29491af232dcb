"""The autograd node of all priors: what `native_program.NativeProgram` lists, run by the CPU kernels in two calls."""

from __future__ import annotations

import array
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bkn_core.norm import compiled_node, native

FIELDS, ACCUMULATES = 23, 12  # of a line in `program.h`, and the place of one of them


class Program(Protocol):
    """The lines, and how their arena is divided."""

    moving: set[int]
    size: int
    results: int

    @property
    def gradient_places(self) -> Tensor:
        """Where the addresses of gradients belong in the structure, as `node.cpp` reads it."""

    def structure(
        self, tensors: Sequence[Tensor | None], gradients: Sequence[Tensor | None], holding: Collection[int] = ()
    ) -> array.array[int]:
        """Return the lines as the kernels read them; the gradients with these numbers hold values to add to."""


def evaluate(program: Program, tensors: Sequence[Tensor]) -> Tensor:
    """Run the lines and return their arena."""
    values = torch.empty(program.size)
    _call("bkn_evaluate", program.structure(tensors, []), values, None)
    return values


def reverse(program: Program, values: Tensor, results: Tensor, lines: array.array[int]) -> None:
    """Run the lines backward from the gradient of the results."""
    arena = torch.zeros(program.size)
    arena[: program.results] = results
    _call("bkn_reverse", lines, values, arena)


class Evaluate(torch.autograd.Function):
    """All priors and gains as one node, from parameters and buffers to one row of results."""

    @staticmethod
    def forward(ctx: Any, program: Program, *tensors: Tensor) -> Tensor:
        values = evaluate(program, tensors)
        ctx.program = program
        ctx.save_for_backward(values, *(None if i in program.moving else tensor for i, tensor in enumerate(tensors)))
        return values[: program.results]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, results: Tensor) -> tuple[Tensor | None, ...]:
        values, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        gradients = [torch.empty_like(t) if w and t is not None else None for t, w in zip(tensors, wanted, strict=True)]
        reverse(ctx.program, values, results, ctx.program.structure(tensors, gradients))
        return None, *gradients


@torch.no_grad()
def add_gradients_(program: Program, tensors: list[Tensor], values: Tensor, results: Tensor) -> None:
    """Add to the gradients of parameters what the gradients of the results say, in place and without autograd.

    Args:
        program: the lines.
        tensors: what they read, of which those that want a gradient are all leaves and different.
        values: the arena of `evaluate`.
        results: gradient of the results.
    """
    operations = compiled_node.node()
    if operations is not None:
        lines = torch.frombuffer(program.structure(tensors, []), dtype=torch.int64).view(-1, FIELDS)
        operations.add_gradients(tensors, lines, program.gradient_places, ACCUMULATES, values, results)
        return
    gradients: list[Tensor | None] = [None] * len(tensors)
    holding, aside = [], []
    for i, tensor in enumerate(tensors):
        if not tensor.requires_grad:
            continue
        known = tensor.grad
        if known is None or not native.is_plain(known) or known.stride() != tensor.stride():
            aside.append(i)
            gradients[i] = torch.empty_like(tensor)
        else:
            holding.append(i)
            gradients[i] = known
    reverse(program, values, results, program.structure(tensors, gradients, holding))
    for i in aside:
        known, found = tensors[i].grad, gradients[i]
        tensors[i].grad = found if known is None or found is None else known + found


def _call(kernel: str, lines: array.array[int], values: Tensor, gradients: Tensor | None) -> None:
    address, length = lines.buffer_info()
    slots = [length // FIELDS, torch.get_num_threads(), values.data_ptr()]
    native.run(kernel, [*slots, 0 if gradients is None else gradients.data_ptr(), address])
