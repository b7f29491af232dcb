"""Nodes of elementwise functions, sums and products.

Functions of one tensor are fused: x * sigmoid(x) is one function of x, not a product of independent factors.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from bkn_core.graph.builder import GraphBuilder
from bkn_core.graph.expressions import Expression, applied, name_or_call
from bkn_core.graph.names import BINARY
from bkn_core.graph.values import Step, Value

_NUMBER = (int, float)


def function(builder: GraphBuilder, step: Step, value: Value) -> Value:
    """A function of one tensor, with numbers and words as options."""
    if not all(isinstance(a, (*_NUMBER, str, type(None))) for a in pytree.tree_leaves(step.arguments)[1:]):
        return Value(reason=f"{step.name} with unusual options")
    name, args = step.name, tuple(a for a in step.arguments[0][1:] if not isinstance(a, bool))  # but for `inplace`
    options = tuple((k, v) for k, v in step.arguments[1].items() if k not in ("input", "inplace"))
    if name == "pow" and not (isinstance(args[0], _NUMBER) and args[0] > 0):
        return Value(reason="pow with something else than a positive number")
    if name == "rrelu":  # its slope is drawn: the expected one
        lower, upper = _range(step)
        name, args, options = "leaky_relu", ((lower + upper) / 2,), ()
    root, expression = builder.origin(value.node)
    expression = (name, (expression, *args), options)
    rest: dict[str, Any] = {"dimension": value.dimension, "words": step.name}
    if builder.is_gaussian(value.node):
        result = builder.write(
            "elementwise", [value.node], builder.channels(value), options=(name, args, options), **rest
        )
    else:  # a function of a function of a Gaussian is one function of it
        result = builder.write("fused", [root], builder.channels(value), options=(expression,), **rest)
    builder.origins[result.node] = (root, expression)
    result.numbers = value.numbers
    return result


def _range(step: Step) -> tuple[float, float]:
    lower, upper = step.argument(1, "lower"), step.argument(2, "upper")
    return 1 / 8 if lower is None else lower, 1 / 3 if upper is None else upper


def prelu(builder: GraphBuilder, step: Step, value: Value) -> Value:
    """A rectifier with a learned slope for each channel, or one for all."""
    known = step.known(step.argument(1, "weight"))
    if known is None or known.parameter is None:
        return Value(reason="prelu whose slope is not a parameter")
    slope: Expression = known.parameter
    root, inner = builder.origin(value.node)
    above = ("mul", (("relu", (inner,), ()), applied("rsub", slope, 1)), ())
    expression = ("add", (("mul", (inner, slope), ()), above), ())  # s x + (1 - s) max(x, 0)
    options: dict[str, Any] = {"dimension": value.dimension, "words": "prelu"}
    if builder.is_gaussian(value.node):
        name = name_or_call(slope)
        result = builder.write("prelu", [value.node], builder.channels(value), name=name, **options)
    else:
        result = builder.write("fused", [root], builder.channels(value), options=(expression,), **options)
    builder.origins[result.node] = (root, expression)
    return result


def gated_linear_unit(builder: GraphBuilder, step: Step, value: Value) -> Value:
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


def binary(builder: GraphBuilder, step: Step, values: list[Value]) -> Value:
    """A sum, difference, product or quotient."""
    name, left, right = step.name, step.argument(0, "input"), step.argument(1, "other")
    if step.arguments[1].get("alpha", 1) != 1 or step.arguments[1].get("rounding_mode") is not None:
        return Value(reason=f"{name} with a factor or rounding")
    if name.startswith("r"):  # rsub, reversed_sub, reversed_div
        left, right = right, left
    name = BINARY[name]
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
    options = (scale, shift)
    result = builder.write("affine", [value.node], builder.channels(value), dimension=value.dimension, options=options)
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
    result = builder.write(
        operation,
        [value.node],
        builder.channels(value),
        dimension=value.dimension,
        name=name_or_call(expression),
        options=() if is_per_channel else (at,),
        words=str(expression),
    )
    if is_per_channel:
        root, inner = builder.origin(value.node)
        builder.origins[result.node] = (root, (symbol, (inner, expression), ()))
    return result


def _with_features(builder: GraphBuilder, name: str, values: list[Value], output: Tensor) -> Value:
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
