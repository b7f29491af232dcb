"""A wiring as a program for the CPU kernels: all priors of a model in one autograd node and two calls.

It does what `evaluate.Evaluation` does with `RULES`, for the operations that the kernels know; for a wiring with any
other operation there is none, and the priors are evaluated line by line in PyTorch.
"""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bkn_core.norm import native
from bkn_core.norm.kalman import Gaussian
from bkn_core.norm.layers import BatchKalmanNorm
from bkn_core.wiring.evaluate import AVERAGE_POWER, INPUT_COVARIANCE, INPUT_MEAN, MAXIMUM_POWER
from bkn_core.wiring.native_node import ACCUMULATES, FIELDS, Evaluate
from bkn_core.wiring.native_tensors import INNOVATIONS, NativeTensors
from bkn_core.wiring.parameters import tensor_of
from bkn_core.wiring.program import Line, Wiring

_NORM, _MEASURED, _CONVOLUTION, _PATCHES, _RELU, _ADD, _MULTIPLY = range(7)
_AFFINE, _GATHER, _REFINE, _AVERAGE, _MAX_POOL, _GAIN = range(7, 13)
_MAXIMA = ("x", ("relu", ("x",), ()))  # what max pooling may pool: a Gaussian, or a rectified one
_PARAMETERS, _LAYOUT, _NUMBERS = 13, 11, 21  # places in the structure of `program.h`


@dataclasses.dataclass(frozen=True)
class Row:
    """One line for the kernels: its fixed fields, and the numbers of the tensors that it reads (-1: none)."""

    fields: tuple[int, ...]
    tensors: tuple[int, ...] = ()
    numbers: tuple[float, ...] = ()
    index: tuple[int, ...] = ()


class _Unsupported(Exception):
    """The kernels do not know an operation."""


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

    The arena begins with the results: all refined means, all refined variances, all gains.

    Args:
        wiring: the program.
        names: all layers, of which each gets its gain.
        model: gives the shapes.

    Raises:
        _Unsupported: see `native_program`.
    """

    def __init__(self, wiring: Wiring, names: Sequence[str], model: nn.Module) -> None:
        self.layers, self.names = tuple(wiring.priors), tuple(names)
        self.paths: list[tuple[str, str]] = []
        self.shapes: list[torch.Size] = []
        self.rows: list[Row] = []
        self.moving: set[int] = set()  # numbers of the tensors that change between forward and backward
        self.model = model
        widths = [_layer(model, name).num_features for name in self.layers]
        self.widths, total = widths, sum(widths)
        self.size = self.results = 2 * total + len(self.names)
        self.places: list[tuple[int, int, int]] = []  # offsets of mean and variance, and channels, of each line
        for line in wiring.lines:
            self.places.append(self._line(line))
        start = 0
        for (name, number), width in zip(wiring.priors.items(), widths, strict=True):
            self._refine(_layer(model, name), name, self.places[number], (start, total + start, width))
            start += width
        for i, name in enumerate(self.names):
            self._gain(name, 2 * total + i)
        self.tensors = NativeTensors(self.paths, self.shapes)
        self._structure: _Structure | None = None
        self._places: Tensor | None = None
        self._filled: tuple[tuple[list[int], list[bool]], array.array[int]] | None = None
        del self.model

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what holds addresses."""
        return {**self.__dict__, "_structure": None, "_filled": None}

    def _tensor(self, module: str, name: str) -> int:
        """Return the number of a parameter or buffer, -1 where the module has None."""
        tensor = tensor_of(self.model, module, name)
        if tensor is None:
            return -1
        if (module, name) not in self.paths:
            self.paths.append((module, name))
            self.shapes.append(tensor.shape)
        return self.paths.index((module, name))

    def _room(self, channels: int) -> tuple[int, int, int]:
        start = self.size
        self.size += 2 * channels
        return start, start + channels, channels

    def _row(self, operation: int, out: tuple[int, int, int], *operands: tuple[int, int, int], **more: Any) -> None:
        first, second = (*operands, (0, 0, 0), (0, 0, 0))[:2]
        shape = more.pop("shape", (first[2], 1, 1))
        self.rows.append(Row((operation, out[2], *out[:2], *first[:2], *second[:2], *shape, 0, 0), **more))

    def _line(self, line: Line) -> tuple[int, int, int]:
        inputs = [self.places[i] for i in line.inputs]
        if line.operation == "pass":
            return inputs[0]
        if line.operation == "concatenate":
            return self._side_by_side(inputs)
        out = self._room(line.channels)
        if line.operation == "norm":
            self._row(_NORM, out, tensors=(self._tensor(line.name, "weight"), self._tensor(line.name, "bias")))
        elif line.operation == "measured":
            self._measured(line, out)
        elif line.operation == "convolution":
            self._convolution(line, inputs[0], out)
        elif line.operation == "patches":
            self._patches(line, out)
        elif line.operation == "elementwise" and line.options[0] == "relu":
            self._row(_RELU, out, inputs[0])
        elif line.operation in ("add", "multiply") and inputs[0][2] == inputs[1][2] == out[2]:
            self._row(_ADD if line.operation == "add" else _MULTIPLY, out, *inputs)
        elif line.operation == "affine" and all(isinstance(number, int | float) for number in line.options):
            self._row(_AFFINE, out, inputs[0], numbers=tuple(map(float, line.options)))
        elif line.operation == "average":
            self._row(_AVERAGE, out, inputs[0], numbers=(line.options[0] ** -AVERAGE_POWER,))
        elif line.operation == "max_pool" and line.options[1] in _MAXIMA:
            numbers = (line.options[0] ** MAXIMUM_POWER, float(line.options[1] != "x"))
            self._row(_MAX_POOL, out, inputs[0], numbers=numbers)
        elif line.operation == "gather":
            self._row(_GATHER, out, inputs[0], index=tuple(line.options[0]))
        else:
            raise _Unsupported
        return out

    def _side_by_side(self, inputs: list[tuple[int, int, int]]) -> tuple[int, int, int]:
        out = self._room(sum(channels for _, _, channels in inputs))
        start = 0
        for place in inputs:
            self._row(_AFFINE, (out[0] + start, out[1] + start, place[2]), place, numbers=(1.0, 0.0))
            start += place[2]
        return out

    def _convolution(self, line: Line, first: tuple[int, int, int], out: tuple[int, int, int]) -> None:
        bias, groups = line.options
        weight = self._named(line.name)
        channels, inner = self.shapes[weight][:2]
        if inner * groups != first[2] or channels != out[2]:
            raise _Unsupported
        taps = self.shapes[weight][2:].numel()
        self._row(_CONVOLUTION, out, first, shape=(first[2], taps, groups), tensors=(weight, self._named(bias)))

    def _patches(self, line: Line, out: tuple[int, int, int]) -> None:
        bias, module = line.options
        weight = self._named(line.name)
        mean, covariance = self._tensor(module, INPUT_MEAN), self._tensor(module, INPUT_COVARIANCE)
        width, taps = self.shapes[weight][1:].numel(), self.shapes[weight][2:].numel()
        if self.shapes[mean] != (width,) or self.shapes[weight][0] != out[2]:
            raise _Unsupported
        is_matrix = int(len(self.shapes[covariance]) == 2)
        tensors = (weight, self._named(bias), mean, covariance)
        self._row(_PATCHES, out, shape=(width, taps, is_matrix), tensors=tensors)

    def _measured(self, line: Line, out: tuple[int, int, int]) -> None:
        mean, covariance = self._tensor(line.name, INPUT_MEAN), self._tensor(line.name, INPUT_COVARIANCE)
        step = out[2] + 1 if len(self.shapes[covariance]) == 2 else 1
        self._row(_MEASURED, out, shape=(0, step, 1), tensors=(mean, covariance))

    def _refine(
        self, layer: BatchKalmanNorm, name: str, prior: tuple[int, int, int], out: tuple[int, int, int]
    ) -> None:
        if prior[2] != out[2]:
            raise _Unsupported
        tensors = tuple(self._tensor(name, of) for of in ("prior_offset", "prior_log_scale", *INNOVATIONS))
        self.moving.update(number for number in tensors[2:] if number >= 0)
        self._row(_REFINE, out, prior, self._room(prior[2]), tensors=tensors, numbers=(layer.eps,))

    def _gain(self, name: str, place: int) -> None:
        layer = _layer(self.model, name)
        is_learned = layer.gain_logit is not None
        value = self._tensor(name, "gain_logit" if is_learned else "fixed_gain")
        if layer.computes_gain:
            self.moving.add(value)
        tensors = (value, self._tensor(name, "gain_factor"))
        self._row(_GAIN, (place, place, 1), tensors=tensors, numbers=(float(is_learned),))

    def _named(self, path: Any) -> int:
        if not path:
            return -1
        if not isinstance(path, str):  # computed from parameters
            raise _Unsupported
        module, _, name = path.rpartition(".")
        return self._tensor(module, name)

    def predictions(self, tensors: list[Tensor]) -> tuple[dict[str, Gaussian], list[Tensor]]:
        """Return the refined priors by the names of their layers, and the gains of all layers."""
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
            if row.fields[0] in (_CONVOLUTION, _PATCHES):
                made.layouts.append((start + _LAYOUT, row.tensors[0]))
            for j, value in enumerate(row.numbers):
                made.fields[start + _NUMBERS + j] = native.bits_of(value)
            if row.index:
                made.indices.append(array.array("q", row.index))
                made.fields[start + _PARAMETERS] = made.indices[-1].buffer_info()[0]
        return made


def native_program(wiring: Wiring, names: Sequence[str], model: nn.Module) -> NativeProgram | None:
    """Return the program of a wiring, None where it has an operation that the kernels do not know."""
    try:
        return NativeProgram(wiring, names, model)
    except _Unsupported:
        return None


def _layer(model: nn.Module, name: str) -> BatchKalmanNorm:
    layer = model.get_submodule(name)
    assert isinstance(layer, BatchKalmanNorm)
    return layer
