"""A program for the CPU kernels: one autograd node, run in two calls.

It does what `operations.Interpreter` does, for the nodes that the kernels know; see `lower` for the others.
"""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bkn_core.filter.kalman import Gaussian
from bkn_core.graph.graph import Graph
from bkn_core.graph.instructions import CONVOLUTION, PATCHES, TRANSPOSED, ProgramBuilder, Slot
from bkn_core.graph.kernel_tensors import KernelTensors
from bkn_core.graph.operations import lower
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.ops import extension, kernels
from bkn_core.ops.priors import ACCUMULATES, FIELDS, RunProgram

_PARAMETERS, _LAYOUT, _INDEX, _NUMBERS = 13, 11, 16, 21  # fields in the structure of `program.h`


@dataclasses.dataclass(frozen=True)
class _Structure:
    """The instructions as the kernels read them, but for what depends on the tensors: where each address goes.

    `parameters` and `layouts` are pairs of an index in `fields` and the number of a tensor; `gradients` say in addition
    where their instruction begins and which bit of it says that there are values to add to.
    """

    fields: array.array[int]
    parameters: list[tuple[int, int]]
    gradients: list[tuple[int, int, int, int]]
    layouts: list[tuple[int, int]]
    indices: list[array.array[int]]  # which `fields` points into


class KernelProgram:
    """The instructions of a graph, as plain data: offsets, shapes and the paths of parameters.

    The arena begins with the results: all means, all variances, all gains.

    Args:
        graph: its nodes "given" are tensors.
        names: all layers, of which each gets its gain; without any, the results are the bare messages.
        model: gives the shapes.

    Raises:
        NoKernel: the kernels do not know a node.
    """

    def __init__(self, graph: Graph, names: Sequence[str], model: nn.Module) -> None:
        self.layers, self.names = tuple(graph.priors), tuple(names)
        self.widths = [graph.nodes[number].channels for number in graph.priors.values()]
        self.given = [node.name for node in graph.nodes if node.operation == "given"]
        total = sum(self.widths)
        self.results = 2 * total + len(self.names)
        builder = ProgramBuilder(model, self.results, self.given)
        slots: list[Slot] = []
        for node in graph.nodes:
            slots.append(lower(builder, node, [slots[i] for i in node.inputs]))
        self.learns_gains = any(_layer(model, name).gain_logit is not None for name in self.names)
        start = 0
        for (name, number), width in zip(graph.priors.items(), self.widths, strict=True):
            out = Slot(start, total + start, width)
            if self.names:
                builder.refine(_layer(model, name), name, slots[number], out)
            else:
                builder.copy(slots[number], out)
            start += width
        for i, name in enumerate(self.names):
            builder.gain(_layer(model, name), name, 2 * total + i)
        self.instructions, self.size, self.moving = builder.instructions, builder.size, builder.moving
        self.tensors = KernelTensors(list(builder.numbers), builder.shapes, self.takes)
        self._structure: _Structure | None = None
        self._in_cpp: extension.Program | None = None
        self._filled: tuple[tuple[list[int], list[bool]], array.array[int]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what holds addresses."""
        return {**self.__dict__, "_structure": None, "_in_cpp": None, "_filled": None}

    def predictions(
        self, model: nn.Module, given: Mapping[int, Gaussian]
    ) -> tuple[dict[str, Gaussian], dict[str, Tensor]] | None:
        """Return all priors (or messages) and gains by the names of their layers, None where the kernels cannot take
        the model's tensors.
        """
        entries = self.tensors(model)
        if entries is None:
            return None
        tensors = [_given(part) for name in self.given for part in given[name]] + entries.values
        return self.named(self.run(model, tensors))

    @staticmethod
    def takes(tensor: Tensor) -> bool:
        """Whether the kernels can read a tensor."""
        return kernels.is_plain(tensor)

    def run(self, model: nn.Module, tensors: list[Tensor]) -> list[Tensor]:
        """Return all means, variances and gains."""
        operations = extension.operations()
        if operations is not None:
            return self.in_cpp(operations).predict(tensors)
        return self.parts(RunProgram.apply(self, *tensors))

    def parts(self, row: Tensor) -> list[Tensor]:
        """Return all means, variances and gains, of a row of them."""
        *parts, gains = torch.split(row, [*self.widths, *self.widths, len(self.names)])
        return [*parts, *(gains if self.learns_gains else gains.detach()).unbind()]

    def named(self, parts: Sequence[Tensor]) -> tuple[dict[str, Gaussian], dict[str, Tensor]]:
        """Return all means, variances and gains by the names of their layers."""
        count = len(self.layers)
        priors = {name: Gaussian(parts[i], parts[count + i]) for i, name in enumerate(self.layers)}
        return priors, dict(zip(self.names, parts[2 * count :], strict=True))

    def in_cpp(self, operations: extension.Operations) -> extension.Program:
        """Return the program as C++ runs it."""
        if self._in_cpp is None:
            self._structure = known = self._structure or self._laid_out()
            tables = [
                torch.tensor(rows, dtype=torch.int64) for rows in (known.parameters, known.layouts, known.gradients)
            ]
            pieces, indices = [*self.widths, *self.widths, *[0] * len(self.names)], map(_shared, known.indices)
            self._in_cpp = operations.program(
                [_shared(known.fields).view(-1, FIELDS), *tables],
                list(indices), pieces, sorted(self.moving), ACCUMULATES, self.size,
            )  # fmt: skip
        return self._in_cpp

    def structure(self, tensors: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> array.array[int]:
        """Return the instructions as the kernels read them."""
        if self._structure is None:
            self._structure = self._laid_out()
        known = self._structure
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        weights = (tensors[number] for _, number in known.layouts)
        form = addresses, [weight is not None and not weight.is_contiguous() for weight in weights]
        if self._filled is None or self._filled[0] != form:
            fields = known.fields[:]
            for at, number in known.parameters:
                fields[at] = addresses[number]
            for (at, _), is_channels_last in zip(known.layouts, form[1], strict=True):
                fields[at] = is_channels_last
            self._filled = form, fields
        fields = self._filled[1]
        if gradients:
            fields = fields[:]
            targets = [kernels.address(tensor) for tensor in gradients]
            for at, number, _, _ in known.gradients:
                fields[at] = targets[number]
        return fields

    def _laid_out(self) -> _Structure:
        made = _Structure(array.array("q", bytes(8 * FIELDS * len(self.instructions))), [], [], [], [])
        written: set[int] = set()
        for i in range(len(self.instructions) - 1, -1, -1):  # backward: what is written first is not added to
            row, start = self.instructions[i], i * FIELDS
            made.fields[start : start + len(row.fields)] = array.array("q", row.fields)
            for j, number in enumerate(row.tensors):
                if number >= 0:
                    made.parameters.append((start + _PARAMETERS + j, number))
                    made.gradients.append((start + _PARAMETERS + 4 + j, number, start, 1 << j))
                    made.fields[start + ACCUMULATES] |= (number in written) << j
                    written.add(number)
            if row.fields[0] in (CONVOLUTION, PATCHES, TRANSPOSED):
                made.layouts.append((start + _LAYOUT, row.tensors[0]))
            for j, value in enumerate(row.numbers):
                made.fields[start + _NUMBERS + j] = kernels.bits_of(value)
            if row.index:
                made.indices.append(array.array("q", row.index))
                made.fields[start + _INDEX] = made.indices[-1].buffer_info()[0]
        return made


def _shared(numbers: array.array[int]) -> Tensor:
    """Return numbers as a tensor that keeps them where they are."""
    return torch.frombuffer(numbers, dtype=torch.int64) if numbers else torch.empty(0, dtype=torch.int64)


def _given(part: Tensor) -> Tensor:
    """Give a message that PyTorch computed the form that the kernels read."""
    return part.to(torch.float32).contiguous()


def _layer(model: nn.Module, name: str) -> BatchKalmanNorm:
    layer = model.get_submodule(name)
    assert isinstance(layer, BatchKalmanNorm)
    return layer
