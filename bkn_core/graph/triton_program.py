"""A program for a GPU's kernels: what `kernel_program.KernelProgram` is for those in C."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bkn_core.errors import ConversionError
from bkn_core.graph.graph import Graph
from bkn_core.graph.instructions import GIVEN
from bkn_core.graph.kernel_program import KernelProgram
from bkn_core.graph.schedule import Schedule
from bkn_core.ops import backend
from bkn_core.ops.cuda.layout import Table

_MOST = 1 << 31  # numbers of a tensor that an offset reaches
_ALIGNED = 4  # numbers between which gradients begin, for vectors of them


class _Known(NamedTuple):
    """A table, and what it was made for: address of each tensor and whether it lies channels last; wanted gradients."""

    places: list[tuple[int, bool]]
    wanted: Sequence[bool]
    table: Table


class TritonProgram(KernelProgram):
    """The instructions of a graph, in the order in which a GPU works through them.

    Their table stays in its memory as long as every parameter stays where it is.
    """

    def __init__(self, graph: Graph, names: Sequence[str], model: nn.Module) -> None:
        super().__init__(graph, names, model)
        self.places: list[slice] = []  # in the arena, of what is given
        computed = []
        for row in self.instructions:
            if row.fields[0] == GIVEN and row.tensors[0] < 2 * len(self.given):
                channels, mean, variance = row.fields[1:4]
                self.places += [slice(mean, mean + channels), slice(variance, variance + channels)]
            else:
                computed.append(row)
        self.schedule = Schedule(computed, self.size)
        self.size = self.schedule.size
        self._known: _Known | None = None
        self._captured: list[Table] = []  # which CUDA graphs read

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what holds addresses."""
        return {**super().__getstate__(), "_known": None, "_captured": []}

    @staticmethod
    def takes(tensor: Tensor) -> bool:
        """Whether a tensor is a float32 array where the kernels run, and no stand-in for one."""
        is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.dtype is torch.float32
        return is_plain and tensor.numel() < _MOST and backend.takes_triton(tensor.device.type)

    def run(self, model: nn.Module, tensors: list[Tensor]) -> list[Tensor]:
        """Return all means, variances and gains."""
        return self.parts(self.row(model, tensors))

    def row(self, model: nn.Module, tensors: Sequence[Tensor]) -> Tensor:
        """Return all results in one row."""
        from bkn_core.ops.cuda.priors import RunOnGPU

        like = tensors[0] if tensors else next(model.parameters())
        row: Tensor = RunOnGPU.apply(self, like.device, *tensors)
        return row

    def table(self, tensors: Sequence[Tensor | None], wanted: Sequence[bool], device: torch.device) -> Table:
        """Return the table for some tensors, with gradients of those that want one.

        Args:
            tensors: what the program reads; None for what is where it was before.
            wanted: whether a gradient is wanted, of each.
            device: where they are.
        """
        before = self._known.places if self._known else [(0, False)] * len(tensors)
        places = [
            before[i] if i < len(self.places) or t is None else (t.data_ptr(), not t.is_contiguous())
            for i, t in enumerate(tensors)
        ]
        if self._known is None or places != before or wanted != self._known.wanted:
            if backend.is_capturing():
                raise ConversionError(
                    "a CUDA graph is captured before the priors' kernels know where the parameters are",
                    "Run some steps as they will be captured first, on a side stream as PyTorch's guide says.",
                )
            sizes = [0 if t is None else t.numel() for t in tensors]
            self._known = _Known(places, wanted, self._made(places, wanted, sizes, device))
        if backend.is_capturing():
            self._captured.append(self._known.table)
        return self._known.table

    def _made(
        self, places: list[tuple[int, bool]], wanted: Sequence[bool], sizes: list[int], device: torch.device
    ) -> Table:
        numbers, size, uses = self.schedule.static.clone(), 0, []
        for at, tensor in self.schedule.addresses:
            numbers[at] = places[tensor][0]
        for at, tensor in self.schedule.layouts:
            numbers[at] = places[tensor][1]
        for at, tensor in self.schedule.gradients:
            if wanted[tensor] and tensor not in self.moving:
                numbers[at] = size
                uses.append((tensor, size))
                size += -(-sizes[tensor] // _ALIGNED) * _ALIGNED
        return Table(numbers.to(device), size, uses)
