"""A program for the CPU kernels: one autograd node, run in two calls.

It does what `evaluate.Evaluation` does with `RULES`, for the lines that the kernels know; see `stages` for the others.
"""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bkn_core.norm import native
from bkn_core.norm.kalman import Gaussian
from bkn_core.norm.layers import BatchKalmanNorm
from bkn_core.wiring.native_node import ACCUMULATES, FIELDS, Evaluate
from bkn_core.wiring.native_tensors import NativeTensors
from bkn_core.wiring.program import Wiring
from bkn_core.wiring.rows import CONVOLUTION, PATCHES, TRANSPOSED, Place, Rows
from bkn_core.wiring.writers import write

_PARAMETERS, _LAYOUT, _INDEX, _NUMBERS = 13, 11, 16, 21  # places in the structure of `program.h`


@dataclasses.dataclass(frozen=True)
class _Structure:
    """The lines as the kernels read them, but for what depends on the tensors: where each address goes.

    `parameters` and `layouts` are pairs of a place in `fields` and the number of a tensor; `gradients` say in addition
    where their line begins and which bit of it says that there are values to add to.
    """

    fields: array.array[int]
    parameters: list[tuple[int, int]]
    gradients: list[tuple[int, int, int, int]]
    layouts: list[tuple[int, int]]
    indices: list[array.array[int]]  # which `fields` points into


class NativeProgram:
    """The rows of a wiring, as plain data: offsets, shapes and the paths of parameters.

    The arena begins with the results: all means, all variances, all gains.

    Args:
        wiring: the program; its lines "given" are tensors.
        names: all layers, of which each gets its gain; without any, the results are the bare messages.
        model: gives the shapes.

    Raises:
        NoKernel: the kernels do not know a line.
    """

    def __init__(self, wiring: Wiring, names: Sequence[str], model: nn.Module) -> None:
        self.layers, self.names = tuple(wiring.priors), tuple(names)
        self.widths = [wiring.lines[number].channels for number in wiring.priors.values()]
        self.given = [line.name for line in wiring.lines if line.operation == "given"]
        total = sum(self.widths)
        self.results = 2 * total + len(self.names)
        rows = Rows(model, self.results, self.given)
        places: list[Place] = []
        for line in wiring.lines:
            places.append(write(rows, line, [places[i] for i in line.inputs]))
        start = 0
        for (name, number), width in zip(wiring.priors.items(), self.widths, strict=True):
            out = Place(start, total + start, width)
            if self.names:
                rows.refine(_layer(model, name), name, places[number], out)
            else:
                rows.copy(places[number], out)
            start += width
        for i, name in enumerate(self.names):
            rows.gain(_layer(model, name), name, 2 * total + i)
        self.rows, self.size, self.moving = rows.rows, rows.size, rows.moving
        self.tensors = NativeTensors(list(rows.numbers), rows.shapes)
        self._structure: _Structure | None = None
        self._places: Tensor | None = None
        self._filled: tuple[tuple[list[int], list[bool]], array.array[int]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what holds addresses."""
        return {**self.__dict__, "_structure": None, "_filled": None}

    def predictions(
        self, model: nn.Module, given: Mapping[int, Gaussian]
    ) -> tuple[dict[str, Gaussian], list[Tensor]] | None:
        """Return all priors (or messages) by their names and the gains of all layers, None where the kernels cannot
        take the model's tensors.
        """
        places = self.tensors(model)
        if places is None:
            return None
        tensors = [_given(part) for name in self.given for part in given[name]] + places.values
        *parts, gains = torch.split(Evaluate.apply(self, *tensors), [*self.widths, *self.widths, len(self.names)])
        return self.named([*parts, *gains.unbind()])

    def named(self, parts: Sequence[Tensor]) -> tuple[dict[str, Gaussian], list[Tensor]]:
        """Return all means, variances and gains by the names of their layers."""
        count = len(self.layers)
        priors = {name: Gaussian(parts[i], parts[count + i]) for i, name in enumerate(self.layers)}
        return priors, list(parts[2 * count :])

    @property
    def gradient_places(self) -> Tensor:
        """Place, number, line and bit of each gradient, see `_Structure`."""
        if self._places is None:
            self._structure = self._structure or self._laid_out()
            self._places = torch.tensor(self._structure.gradients, dtype=torch.int64).view(-1, 4)
        return self._places

    def structure(self, tensors: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> array.array[int]:
        """Return the lines as the kernels read them."""
        if self._structure is None:
            self._structure = self._laid_out()
        known = self._structure
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        weights = (tensors[number] for _, number in known.layouts)
        form = addresses, [weight is not None and not weight.is_contiguous() for weight in weights]
        if self._filled is None or self._filled[0] != form:
            fields = known.fields[:]
            for place, number in known.parameters:
                fields[place] = addresses[number]
            for (place, _), is_channels_last in zip(known.layouts, form[1], strict=True):
                fields[place] = is_channels_last
            self._filled = form, fields
        fields = self._filled[1]
        if gradients:
            fields = fields[:]
            targets = [native.address(tensor) for tensor in gradients]
            for place, number, _, _ in known.gradients:
                fields[place] = targets[number]
        return fields

    def _laid_out(self) -> _Structure:
        made = _Structure(array.array("q", bytes(8 * FIELDS * len(self.rows))), [], [], [], [])
        written: set[int] = set()
        for i in range(len(self.rows) - 1, -1, -1):  # backward: what is written first is not added to
            row, start = self.rows[i], i * FIELDS
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
                made.fields[start + _NUMBERS + j] = native.bits_of(value)
            if row.index:
                made.indices.append(array.array("q", row.index))
                made.fields[start + _INDEX] = made.indices[-1].buffer_info()[0]
        return made


def _given(part: Tensor) -> Tensor:
    """Give a message that PyTorch computed the form that the kernels read."""
    return part.to(torch.float32).contiguous()


def _layer(model: nn.Module, name: str) -> BatchKalmanNorm:
    layer = model.get_submodule(name)
    assert isinstance(layer, BatchKalmanNorm)
    return layer
