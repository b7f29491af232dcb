"""Sums, differences, products and quotients: of features, and with numbers and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from bkn_core.filter import propagate, spatial
from bkn_core.filter.kalman import Gaussian
from bkn_core.graph import instructions as op
from bkn_core.graph.expressions import Expression, applied, name_or_call, parameter
from bkn_core.graph.graph import GraphBuilder, Node
from bkn_core.graph.instructions import NoKernel, ProgramBuilder, Slot
from bkn_core.graph.rules.pointwise import numbers_of
from bkn_core.graph.rules.rule import Rule, unsaid
from bkn_core.graph.values import Step, Value, names

_NUMBER = (int, float)
# What each function computes of its left and right operand; those that begin with r exchange them.
_SUMS = {"add": "add", "sub": "sub", "subtract": "sub", "rsub": "sub", "reversed_sub": "sub"}
_PRODUCTS = {"mul": "mul", "multiply": "mul", **dict.fromkeys(names("div divide truediv true_divide"), "div")}
_PRODUCTS |= {"reversed_truediv": "div", "reversed_div": "div"}


def binary(builder: GraphBuilder, step: Step, *values: Value) -> Value:
    """A sum, difference, product or quotient."""
    name, left, right = step.name, step.argument(0, "input"), step.argument(1, "other")
    if step.arguments[1].get("alpha", 1) != 1 or step.arguments[1].get("rounding_mode") is not None:
        return Value(reason=f"{name} with a factor or rounding")
    if name.startswith("r"):  # rsub, reversed_sub, reversed_div
        left, right = right, left
    name = (_SUMS | _PRODUCTS)[name]
    if isinstance(left, _NUMBER) or isinstance(right, _NUMBER):
        return _with_number(builder, name, left, right, values[0])
    if len(values) == 1:
        return _with_parameter(builder, step, name, left, right)
    if name == "div":
        return Value(reason="div of features by features")
    return _with_features(builder, name, values, step.outputs[0])


def _with_number(builder: GraphBuilder, name: str, left: Any, right: Any, value: Value) -> Value:
    if not builder.read_numbers.isdisjoint((left if isinstance(left, _NUMBER) else right,)):
        return Value(reason=f"{name} with a number read from a tensor")
    if isinstance(left, _NUMBER):
        pairs = {"add": (1.0, left), "mul": (left, 0.0), "sub": (-1.0, left)}
    else:
        pairs = {"add": (1.0, right), "mul": (right, 0.0), "sub": (1.0, -right), "div": (1 / (right or 1), 0.0)}
    if name not in pairs:
        return Value(reason=f"{name} of a number by a tensor")
    scale, shift = (float(number) for number in pairs[name])
    return _affine(builder, value, scale, shift)


def _affine(builder: GraphBuilder, value: Value, scale: float, shift: float) -> Value:
    result = builder.follow("affine", value, options=(scale, shift))
    root, expression = builder.origin(value.node)
    builder.origins[result.node] = (root, ("add", (("mul", (expression, scale), ()), shift), ()))
    return result


def _with_parameter(builder: GraphBuilder, step: Step, name: str, left: Any, right: Any) -> Value:
    """Scale or shift features by a parameter: a number for each channel, one for all, or one for each position."""
    reverse = (known := step.known(left)) is not None and known.parameter is not None
    tensor, value = (left, step.known(right)) if reverse else (right, known)
    operand = step.known(tensor)
    if operand is None or operand.parameter is None or value is None:
        return Value(reason=f"{name} with a number tensor made in the forward")
    if value.tensor is None or step.outputs[0].shape != value.tensor.shape:
        return Value(reason=f"{name} with a parameter of unexpected shape")
    shape = value.tensor.shape
    at = value.dimension - len(shape)  # from the right, as broadcasting aligns
    expression: Expression = operand.parameter
    if name == "div":
        if reverse:
            return Value(reason="div of a parameter by features")
        expression = applied("reciprocal", expression)
    elif name == "sub" and not reverse:
        expression = applied("neg", expression)
    elif name == "sub":
        value = _affine(builder, value, -1.0, 0.0)
    operation, symbol = ("scale", "mul") if name in ("mul", "div") else ("shift", "add")
    is_per_channel = all(size == 1 or i == at for i, size in zip(range(-tensor.dim(), 0), tensor.shape, strict=True))
    if not is_per_channel and (tensor.dim() < -at or tensor.shape[at] != shape[at]):
        return Value(reason=f"{name} with a parameter that differs between positions alike for all channels")
    rest: dict[str, Any] = {"options": () if is_per_channel else (at,), "words": str(expression)}
    result = builder.follow(operation, value, name=name_or_call(expression), **rest)
    if is_per_channel:
        root, inner = builder.origin(value.node)
        builder.origins[result.node] = (root, (symbol, (inner, expression), ()))
    return result


def _with_features(builder: GraphBuilder, name: str, values: Sequence[Value], output: Tensor) -> Value:
    first, second = values
    assert first.tensor is not None and second.tensor is not None
    if first.dimension - first.tensor.dim() != second.dimension - second.tensor.dim():
        return Value(reason=f"{name} of tensors whose channels are not aligned")
    dimension = output.dim() + first.dimension - first.tensor.dim()
    channels = max(builder.channels(v) for v in values)
    (root, left), (other, right) = builder.origin(first.node), builder.origin(second.node)
    if root == other:  # both are functions of one tensor, as in x * sigmoid(x): not independent, so one function
        expression = (name, (left, right), ())
        result = builder.write("fused", [root], channels, dimension=dimension, options=(expression,), words=name)
        builder.origins[result.node] = (root, expression)
        return result
    nodes = [first.node, second.node]
    if name == "sub":
        nodes[1] = _affine(builder, second, -1.0, 0.0).node
    return builder.write("multiply" if name == "mul" else "add", nodes, channels, dimension=dimension)


def gated_linear_unit(builder: GraphBuilder, step: Step, value: Value, *_: Value) -> Value:
    """The first half of the channels times the sigmoid of the second."""
    dim, half = step.argument(1, "dim"), builder.channels(value) // 2
    assert value.tensor is not None
    if (-1 if dim is None else dim) % value.tensor.dim() != value.dimension:
        return Value(reason="glu across something else than channels")
    parts = [tuple(range(half)), tuple(range(half, 2 * half))]
    rest = {"dimension": value.dimension}
    left, right = (builder.write("gather", [value.node], half, options=(index,), **rest) for index in parts)
    if not builder.is_gaussian(value.node):
        return Value(reason="glu of a function of features")
    gate = builder.write("elementwise", [right.node], half, options=("sigmoid", (), ()), words="sigmoid", **rest)
    return builder.write("multiply", [left.node, gate.node], half, **rest)


def _scale(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    if node.options:
        return propagate.multiply(inputs[0], spatial.over_positions(parameter(model, node.name), *node.options))
    return propagate.affine(inputs[0], parameter(model, node.name).flatten(), 0.0)


def _shift(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    if node.options:
        return propagate.add(inputs[0], spatial.over_positions(parameter(model, node.name), *node.options))
    return propagate.affine(inputs[0], 1.0, parameter(model, node.name).flatten())


def _joined(_: Node, inputs: list[Gaussian], __: nn.Module) -> Gaussian:
    first, second = inputs
    if first.mean.shape[-1] == second.mean.shape[-1] and first.variance.dim() == second.variance.dim():
        return propagate.add(first, second)
    return first if first.mean.shape[-1] > 1 else second


def _lower_scale_or_shift(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    if node.options or inputs[0].channels != node.channels:  # a number for each position, or for more channels
        raise NoKernel
    operation = op.SCALE if node.operation == "scale" else op.SHIFT
    return builder.write(operation, builder.slot(node.channels), inputs[0], **numbers_of(builder, node))


def _lower_affine(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    if not all(isinstance(number, int | float) for number in node.options):
        raise NoKernel
    return builder.write(op.AFFINE, builder.slot(node.channels), inputs[0], numbers=tuple(map(float, node.options)))


def _lower_binary(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    inputs = [_repeated(builder, slot, node.channels) for slot in inputs]
    return builder.write(op.ADD if node.operation == "add" else op.MULTIPLY, builder.slot(node.channels), *inputs)


def _repeated(builder: ProgramBuilder, message: Slot, channels: int) -> Slot:
    """Give one channel, which a product takes for all, as often as it is taken."""
    if message.channels == channels:
        return message
    if message.channels != 1:
        raise NoKernel
    return builder.write(op.GATHER, builder.slot(channels), message, index=(0,) * channels)


def _product(_: Node, inputs: list[str]) -> str:
    return " * ".join(f"({text})" if " + " in text else text for text in inputs)


def _scaled(node: Node, inputs: list[str]) -> str:
    return f"{node.words} * ({inputs[0]})" if " " in inputs[0] else f"{node.words} * {inputs[0]}"


RULES = {
    "add": Rule(
        lambda _, inputs, __: propagate.add(*inputs),
        _lower_binary,
        lambda _, inputs: " + ".join(inputs),
        dict.fromkeys(_SUMS, binary),
        _joined,
    ),
    "multiply": Rule(
        lambda _, inputs, __: propagate.multiply(*inputs),
        _lower_binary,
        _product,
        {**dict.fromkeys(_PRODUCTS, binary), "glu": gated_linear_unit},
    ),
    "affine": Rule(lambda node, inputs, _: propagate.affine(inputs[0], *node.options), _lower_affine, unsaid),
    "scale": Rule(_scale, _lower_scale_or_shift, _scaled),
    "shift": Rule(_shift, _lower_scale_or_shift, unsaid),
}
