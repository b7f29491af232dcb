"""How each line of a wiring is written for the CPU kernels.

A writer takes the rows so far, the line and the places of what it reads, and returns the place of the result. It raises
`NoKernel` where the kernels do not know the line: PyTorch evaluates it then, see `stages`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bkn_core.norm.positions import phases
from bkn_core.wiring.curves import code_of
from bkn_core.wiring.evaluate import AVERAGE_POWER, INPUT_COVARIANCE, INPUT_MEAN, MAXIMUM_POWER
from bkn_core.wiring.parameters import Call, Parameter
from bkn_core.wiring.program import Line
from bkn_core.wiring.rows import (
    ADD,
    AFFINE,
    AVERAGE,
    CLIPPED,
    CONVOLUTION,
    CURVE,
    GATHER,
    GIVEN,
    LEAKY,
    MAX_POOL,
    MULTIPLY,
    NORM,
    PATCHES,
    RELU,
    SCALE,
    SHIFT,
    TRANSPOSED,
    NoKernel,
    Place,
    Rows,
)

_KEPT = 4  # derivatives that the kernels keep of each channel
_VIEWS = frozenset(("view", "reshape", "flatten", "squeeze", "unsqueeze"))  # keep the order of the values
_MAXIMA = ("x", ("relu", ("x",), ()))  # what max pooling pools without code: a Gaussian, or a rectified one

Writer = Callable[[Rows, Line, Sequence[Place]], Place]


def _norm(rows: Rows, line: Line, inputs: Sequence[Place]) -> Place:
    tensors = (rows.tensor(line.name, "weight"), rows.tensor(line.name, "bias"))
    return rows.write(NORM, rows.room(line.channels), tensors=tensors)


def _measured(rows: Rows, line: Line, inputs: Sequence[Place]) -> Place:
    mean, covariance = rows.tensor(line.name, INPUT_MEAN), rows.tensor(line.name, INPUT_COVARIANCE)
    step = line.channels + 1 if len(rows.shape(covariance)) == 2 else 1
    return rows.write(GIVEN, rows.room(line.channels), shape=(0, step, 1), tensors=(mean, covariance))


def _given(rows: Rows, line: Line, inputs: Sequence[Place]) -> Place:
    first = 2 * rows.given.index(line.name)
    return rows.write(GIVEN, rows.room(line.channels), shape=(0, 1, 1), tensors=(first, first + 1))


def _convolution(rows: Rows, line: Line, inputs: Sequence[Place]) -> Place:
    bias, groups = line.options
    weight = rows.named(line.name)
    channels, inner, *taps = rows.shape(weight)
    if inner * groups != inputs[0].channels or channels != line.channels:
        raise NoKernel
    shape = (inner * groups, torch.Size(taps).numel(), groups)
    tensors = (weight, rows.named(bias))
    return rows.write(CONVOLUTION, rows.room(channels), inputs[0], shape=shape, tensors=tensors)


def _patches(rows: Rows, line: Line, inputs: Sequence[Place]) -> Place:
    bias, module = line.options
    weight = rows.named(line.name)
    mean, covariance = rows.tensor(module, INPUT_MEAN), rows.tensor(module, INPUT_COVARIANCE)
    width, taps = rows.shape(weight)[1:].numel(), rows.shape(weight)[2:].numel()
    if rows.shape(mean) != (width,) or rows.shape(weight)[0] != line.channels:
        raise NoKernel
    is_matrix = int(len(rows.shape(covariance)) == 2)
    tensors = (weight, rows.named(bias), mean, covariance)
    return rows.write(PATCHES, rows.room(line.channels), shape=(width, taps, is_matrix), tensors=tensors)


_CLOSED_FORMS: dict[str, Callable[..., tuple[int, float, float]]] = {
    "relu": lambda: (RELU, 0.0, 0.0),
    "relu6": lambda: (CLIPPED, 0.0, 6.0),
    "hardtanh": lambda min_val=-1.0, max_val=1.0: (CLIPPED, min_val, max_val),
    "leaky_relu": lambda negative_slope=0.01: (LEAKY, negative_slope, 0.0),
}


def _elementwise(rows: Rows, line: Line, inputs: Sequence[Place]) -> Place:
    name, arguments, options = line.options
    if name not in _CLOSED_FORMS:
        return _curve(rows, line, inputs[0], (name, ("x", *arguments), options))
    operation, *numbers = _CLOSED_FORMS[name](*arguments, **dict(options))
    if operation == RELU:
        return rows.write(RELU, rows.room(line.channels), inputs[0])
    return _kept(rows, operation, inputs[0], numbers=tuple(map(float, numbers)))


def _kept(rows: Rows, operation: int, message: Place, **more: Any) -> Place:
    room = rows.room(_KEPT // 2 * message.channels)
    return rows.write(operation, rows.room(message.channels), message, room, **more)


def _curve(rows: Rows, line: Line, message: Place, expression: Any, count: float = 1.0) -> Place:
    code = code_of(expression)
    if code is None or message.channels != line.channels:
        raise NoKernel
    return _kept(rows, CURVE, message, numbers=(count,), index=code)


def _fused(rows: Rows, line: Line, inputs: Sequence[Place]) -> Place:
    return _curve(rows, line, inputs[0], line.options[0])


def _prelu(rows: Rows, line: Line, inputs: Sequence[Place]) -> Place:
    return _kept(rows, LEAKY, inputs[0], **_parameter(rows, line))


def _seen(expression: Any) -> Any:
    """Return the path of a parameter that an expression shows in another shape, the expression itself otherwise."""
    inner = expression
    while isinstance(inner, Call) and inner.function.rpartition(".")[2] in _VIEWS:
        inner = inner.arguments[0]
    return inner.path if isinstance(inner, Parameter) else expression


def _parameter(rows: Rows, line: Line) -> dict[str, Any]:
    """Return what a row says of one parameter, of a number for each channel or one for all."""
    number = rows.named(_seen(line.name))
    size = rows.shape(number).numel()
    if size not in (1, line.channels):
        raise NoKernel
    return {"shape": (line.channels, int(size > 1), 1), "tensors": (number,)}


def _scale_or_shift(rows: Rows, line: Line, inputs: Sequence[Place]) -> Place:
    if line.options or inputs[0].channels != line.channels:  # a number for each position, or for more channels
        raise NoKernel
    operation = SCALE if line.operation == "scale" else SHIFT
    return rows.write(operation, rows.room(line.channels), inputs[0], **_parameter(rows, line))


def _transposed_convolution(rows: Rows, line: Line, inputs: Sequence[Place]) -> Place:
    bias, groups, stride, dilation = line.options
    weight = rows.named(line.name)
    width, inner, *taps = rows.shape(weight)
    if width != inputs[0].channels or inner * groups != line.channels:
        raise NoKernel
    table = phases(torch.empty(1, 1, *taps), stride, dilation)
    more = {"numbers": (float(table.shape[1]),), "index": tuple(table.argmax(1).tolist())}
    tensors, shape = (weight, rows.named(bias)), (width, table.shape[0], groups)
    return rows.write(TRANSPOSED, rows.room(line.channels), inputs[0], shape=shape, tensors=tensors, **more)


def _max_pool(rows: Rows, line: Line, inputs: Sequence[Place]) -> Place:
    count, expression = line.options
    if expression not in _MAXIMA:
        return _curve(rows, line, inputs[0], expression, count**MAXIMUM_POWER)
    numbers = (count**MAXIMUM_POWER, float(expression != "x"))
    return rows.write(MAX_POOL, rows.room(line.channels), inputs[0], numbers=numbers)


def _average(rows: Rows, line: Line, inputs: Sequence[Place]) -> Place:
    numbers = (line.options[0] ** -AVERAGE_POWER,)
    return rows.write(AVERAGE, rows.room(line.channels), inputs[0], numbers=numbers)


def _gather(rows: Rows, line: Line, inputs: Sequence[Place]) -> Place:
    return rows.write(GATHER, rows.room(line.channels), inputs[0], index=tuple(line.options[0]))


def _affine(rows: Rows, line: Line, inputs: Sequence[Place]) -> Place:
    if not all(isinstance(number, int | float) for number in line.options):
        raise NoKernel
    return rows.write(AFFINE, rows.room(line.channels), inputs[0], numbers=tuple(map(float, line.options)))


def _binary(rows: Rows, line: Line, inputs: Sequence[Place]) -> Place:
    inputs = [_repeated(rows, place, line.channels) for place in inputs]
    return rows.write(ADD if line.operation == "add" else MULTIPLY, rows.room(line.channels), *inputs)


def _repeated(rows: Rows, message: Place, channels: int) -> Place:
    """Give one channel, which a product takes for all, as often as it is taken."""
    if message.channels == channels:
        return message
    if message.channels != 1:
        raise NoKernel
    return rows.write(GATHER, rows.room(channels), message, index=(0,) * channels)


def _concatenate(rows: Rows, line: Line, inputs: Sequence[Place]) -> Place:
    out = rows.room(sum(place.channels for place in inputs))
    start = 0
    for place in inputs:
        rows.copy(place, Place(out.mean + start, out.variance + start, place.channels))
        start += place.channels
    return out


WRITERS: dict[str, Writer] = {
    "norm": _norm,
    "measured": _measured,
    "given": _given,
    "convolution": _convolution,
    "patches": _patches,
    "elementwise": _elementwise,
    "fused": _fused,
    "prelu": _prelu,
    "scale": _scale_or_shift,
    "shift": _scale_or_shift,
    "transposed_convolution": _transposed_convolution,
    "max_pool": _max_pool,
    "average": _average,
    "gather": _gather,
    "pass": lambda _, __, inputs: inputs[0],
    "affine": _affine,
    "add": _binary,
    "multiply": _binary,
    "concatenate": _concatenate,
}


def write(rows: Rows, line: Line, inputs: Sequence[Place]) -> Place:
    """Write a line.

    Raises:
        NoKernel: the kernels do not know it.
    """
    if line.operation not in WRITERS:
        raise NoKernel
    return WRITERS[line.operation](rows, line, inputs)
