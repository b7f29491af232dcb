"""How each node of a graph is written for the CPU kernels.

A writer takes the program so far, the node and the slots of what it reads, and returns the slot of the result. It
raises `NoKernel` where the kernels do not know the node: PyTorch evaluates it then, see `lower`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bkn_core.filter.spatial import phases
from bkn_core.graph import instructions as op
from bkn_core.graph.expressions import Call, Parameter
from bkn_core.graph.graph import Node
from bkn_core.graph.instructions import NoKernel, ProgramBuilder, Slot
from bkn_core.graph.interpret import AVERAGE_POWER, INPUT_COVARIANCE, INPUT_MEAN, MAXIMUM_POWER
from bkn_core.graph.rules.curves import code_of

_KEPT = 4  # derivatives that the kernels keep of each channel
_VIEWS = frozenset(("view", "reshape", "flatten", "squeeze", "unsqueeze"))  # keep the order of the values
_MAXIMA = ("x", ("relu", ("x",), ()))  # what max pooling pools without code: a Gaussian, or a rectified one

Writer = Callable[[ProgramBuilder, Node, Sequence[Slot]], Slot]


def _norm(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    tensors = (builder.tensor(node.name, "weight"), builder.tensor(node.name, "bias"))
    return builder.write(op.NORM, builder.slot(node.channels), tensors=tensors)


def _measured(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    mean, covariance = builder.tensor(node.name, INPUT_MEAN), builder.tensor(node.name, INPUT_COVARIANCE)
    step = node.channels + 1 if len(builder.shape(covariance)) == 2 else 1
    return builder.write(op.GIVEN, builder.slot(node.channels), shape=(0, step, 1), tensors=(mean, covariance))


def _given(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    first = 2 * builder.given.index(node.name)
    return builder.write(op.GIVEN, builder.slot(node.channels), shape=(0, 1, 1), tensors=(first, first + 1))


def _convolution(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    bias, groups = node.options
    weight = builder.named(node.name)
    channels, inner, *taps = builder.shape(weight)
    if inner * groups != inputs[0].channels or channels != node.channels:
        raise NoKernel
    shape = (inner * groups, torch.Size(taps).numel(), groups)
    tensors = (weight, builder.named(bias))
    return builder.write(op.CONVOLUTION, builder.slot(channels), inputs[0], shape=shape, tensors=tensors)


def _patches(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    bias, module = node.options
    weight = builder.named(node.name)
    mean, covariance = builder.tensor(module, INPUT_MEAN), builder.tensor(module, INPUT_COVARIANCE)
    width, taps = builder.shape(weight)[1:].numel(), builder.shape(weight)[2:].numel()
    if builder.shape(mean) != (width,) or builder.shape(weight)[0] != node.channels:
        raise NoKernel
    is_matrix = int(len(builder.shape(covariance)) == 2)
    tensors = (weight, builder.named(bias), mean, covariance)
    return builder.write(op.PATCHES, builder.slot(node.channels), shape=(width, taps, is_matrix), tensors=tensors)


_CLOSED_FORMS: dict[str, Callable[..., tuple[int, float, float]]] = {
    "relu": lambda: (op.RELU, 0.0, 0.0),
    "relu6": lambda: (op.CLIPPED, 0.0, 6.0),
    "hardtanh": lambda min_val=-1.0, max_val=1.0: (op.CLIPPED, min_val, max_val),
    "leaky_relu": lambda negative_slope=0.01: (op.LEAKY, negative_slope, 0.0),
}


def _elementwise(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    name, arguments, options = node.options
    if name not in _CLOSED_FORMS:
        return _curve(builder, node, inputs[0], (name, ("x", *arguments), options))
    operation, *numbers = _CLOSED_FORMS[name](*arguments, **dict(options))
    if operation == op.RELU:
        return builder.write(op.RELU, builder.slot(node.channels), inputs[0])
    return _kept(builder, operation, inputs[0], numbers=tuple(map(float, numbers)))


def _kept(builder: ProgramBuilder, operation: int, message: Slot, **more: Any) -> Slot:
    scratch = builder.slot(_KEPT // 2 * message.channels)
    return builder.write(operation, builder.slot(message.channels), message, scratch, **more)


def _curve(builder: ProgramBuilder, node: Node, message: Slot, expression: Any, count: float = 1.0) -> Slot:
    code = code_of(expression)
    if code is None or message.channels != node.channels:
        raise NoKernel
    return _kept(builder, op.CURVE, message, numbers=(count,), index=code)


def _fused(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    return _curve(builder, node, inputs[0], node.options[0])


def _prelu(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    return _kept(builder, op.LEAKY, inputs[0], **_parameter(builder, node))


def _seen(expression: Any) -> Any:
    """Return the path of a parameter that an expression shows in another shape, the expression itself otherwise."""
    inner = expression
    while isinstance(inner, Call) and inner.function.rpartition(".")[2] in _VIEWS:
        inner = inner.arguments[0]
    return inner.path if isinstance(inner, Parameter) else expression


def _parameter(builder: ProgramBuilder, node: Node) -> dict[str, Any]:
    """Return what a row says of one parameter, of a number for each channel or one for all."""
    number = builder.named(_seen(node.name))
    size = builder.shape(number).numel()
    if size not in (1, node.channels):
        raise NoKernel
    return {"shape": (node.channels, int(size > 1), 1), "tensors": (number,)}


def _scale_or_shift(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    if node.options or inputs[0].channels != node.channels:  # a number for each position, or for more channels
        raise NoKernel
    operation = op.SCALE if node.operation == "scale" else op.SHIFT
    return builder.write(operation, builder.slot(node.channels), inputs[0], **_parameter(builder, node))


def _transposed_convolution(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    bias, groups, stride, dilation = node.options
    weight = builder.named(node.name)
    width, inner, *taps = builder.shape(weight)
    if width != inputs[0].channels or inner * groups != node.channels:
        raise NoKernel
    table = phases(torch.empty(1, 1, *taps), stride, dilation)
    more = {"numbers": (float(table.shape[1]),), "index": tuple(table.argmax(1).tolist())}
    tensors, shape = (weight, builder.named(bias)), (width, table.shape[0], groups)
    return builder.write(op.TRANSPOSED, builder.slot(node.channels), inputs[0], shape=shape, tensors=tensors, **more)


def _max_pool(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    count, expression = node.options
    if expression not in _MAXIMA:
        return _curve(builder, node, inputs[0], expression, count**MAXIMUM_POWER)
    numbers = (count**MAXIMUM_POWER, float(expression != "x"))
    return builder.write(op.MAX_POOL, builder.slot(node.channels), inputs[0], numbers=numbers)


def _average(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    numbers = (node.options[0] ** -AVERAGE_POWER,)
    return builder.write(op.AVERAGE, builder.slot(node.channels), inputs[0], numbers=numbers)


def _gather(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    return builder.write(op.GATHER, builder.slot(node.channels), inputs[0], index=tuple(node.options[0]))


def _affine(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    if not all(isinstance(number, int | float) for number in node.options):
        raise NoKernel
    return builder.write(op.AFFINE, builder.slot(node.channels), inputs[0], numbers=tuple(map(float, node.options)))


def _binary(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    inputs = [_repeated(builder, slot, node.channels) for slot in inputs]
    return builder.write(op.ADD if node.operation == "add" else op.MULTIPLY, builder.slot(node.channels), *inputs)


def _repeated(builder: ProgramBuilder, message: Slot, channels: int) -> Slot:
    """Give one channel, which a product takes for all, as often as it is taken."""
    if message.channels == channels:
        return message
    if message.channels != 1:
        raise NoKernel
    return builder.write(op.GATHER, builder.slot(channels), message, index=(0,) * channels)


def _concatenate(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    out = builder.slot(sum(slot.channels for slot in inputs))
    start = 0
    for slot in inputs:
        builder.copy(slot, Slot(out.mean + start, out.variance + start, slot.channels))
        start += slot.channels
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


def write(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    """Write a node.

    Raises:
        NoKernel: the kernels do not know it.
    """
    if node.operation not in WRITERS:
        raise NoKernel
    return WRITERS[node.operation](builder, node, inputs)
