"""Functions of each value by itself.

A function of a function of a Gaussian is fused into one function of it: x * sigmoid(x) is no product of independent
factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from bkn_core.filter import propagate
from bkn_core.filter.kalman import Gaussian
from bkn_core.graph import instructions as op
from bkn_core.graph.expressions import Call, Expression, Parameter, applied, name_or_call, parameter
from bkn_core.graph.graph import GraphBuilder, Node
from bkn_core.graph.instructions import NoKernel, ProgramBuilder, Slot
from bkn_core.graph.rules.curves import code_of
from bkn_core.graph.rules.rule import Rule
from bkn_core.graph.values import Step, Value, names

_NUMBER = (int, float)
_KEPT = 4  # derivatives that the kernels keep of each channel
_VIEWS = frozenset(("view", "reshape", "flatten", "squeeze", "unsqueeze"))  # keep the order of the values

ELEMENTWISE = names(
    """abs absolute atan celu clamp clamp_min clamp_max clip cos elu erf exp gelu hardshrink hardsigmoid hardswish
    hardtanh leaky_relu log1p logsigmoid mish neg negative pow relu relu6 rrelu selu sigmoid silu sin softplus
    softshrink softsign sqrt square tanh tanhshrink threshold"""
)


def function(builder: GraphBuilder, step: Step, value: Value, *_: Value) -> Value:
    """A function of one tensor, with numbers and words as options."""
    if not all(isinstance(a, (*_NUMBER, str, type(None))) for a in pytree.tree_leaves(step.arguments)[1:]):
        return Value(reason=f"{step.name} with unusual options")
    name, args = step.name, tuple(a for a in step.arguments[0][1:] if not isinstance(a, bool))  # but for `inplace`
    options = tuple((k, v) for k, v in step.arguments[1].items() if k not in ("input", "inplace"))
    if name == "pow" and not (isinstance(args[0], _NUMBER) and args[0] > 0):
        return Value(reason="pow with something else than a positive number")
    if name == "rrelu":  # its slope is drawn: the expected one
        lower, upper = step.argument(1, "lower"), step.argument(2, "upper")
        slope = ((1 / 8 if lower is None else lower) + (1 / 3 if upper is None else upper)) / 2
        name, args, options = "leaky_relu", (slope,), ()
    expression = (name, (builder.origin(value.node)[1], *args), options)
    return builder.apply("elementwise", value, expression, options=(name, args, options), words=step.name)


def prelu(builder: GraphBuilder, step: Step, value: Value, *_: Value) -> Value:
    """A rectifier with a learned slope for each channel, or one for all."""
    known = step.known(step.argument(1, "weight"))
    if known is None or known.parameter is None:
        return Value(reason="prelu whose slope is not a parameter")
    slope: Expression = known.parameter
    inner = builder.origin(value.node)[1]
    above = ("mul", (("relu", (inner,), ()), applied("rsub", slope, 1)), ())
    expression = ("add", (("mul", (inner, slope), ()), above), ())  # s x + (1 - s) max(x, 0)
    return builder.apply("prelu", value, expression, name=name_or_call(slope), words="prelu")


_FAR = 1e9  # instead of infinity, whose gradient would be no number

# Closed forms and their numbers; every other function goes through quadrature.
CLOSED_FORMS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "relu": lambda: (propagate.relu,),
    "relu6": lambda: (propagate.clipped, 0.0, 6.0),
    "hardtanh": lambda min_val=-1.0, max_val=1.0: (propagate.clipped, min_val, max_val),
    "threshold": lambda threshold, value: (propagate.thresholded, -_FAR, threshold, value),
    "hardshrink": lambda lambd=0.5: (propagate.thresholded, -lambd, lambd, 0.0),
    "leaky_relu": lambda negative_slope=0.01: (propagate.leaky_relu, negative_slope),
}
_KERNELS: dict[Any, int] = {propagate.relu: op.RELU, propagate.clipped: op.CLIPPED, propagate.leaky_relu: op.LEAKY}


def _elementwise(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    name, arguments, options = node.options
    if name in CLOSED_FORMS:
        form, *numbers = CLOSED_FORMS[name](*arguments, **dict(options))
        result: Gaussian = form(inputs[0], *numbers)
        return result
    return propagate.elementwise(inputs[0], lambda x: _function(name)(x, *arguments, **dict(options)))


def _lower_elementwise(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    name, arguments, options = node.options
    form, *numbers = CLOSED_FORMS[name](*arguments, **dict(options)) if name in CLOSED_FORMS else (None,)
    if form not in _KERNELS:
        return curve(builder, node, inputs[0], (name, ("x", *arguments), options))
    if not numbers:
        return builder.write(_KERNELS[form], builder.slot(node.channels), inputs[0])
    return _kept(builder, _KERNELS[form], inputs[0], numbers=tuple(map(float, numbers)))


def _fused(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    return propagate.elementwise(inputs[0], lambda x: evaluated(node.options[0], x, model))


def _lower_fused(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    return curve(builder, node, inputs[0], node.options[0])


def evaluated(expression: Any, x: Tensor, model: nn.Module) -> Any:
    """Evaluate a nested (name, arguments, options) on the points x; "x" stands for them."""
    if expression == "x":
        return x
    if isinstance(expression, Parameter | Call):
        return parameter(model, expression).flatten()
    if not isinstance(expression, tuple):
        return expression
    name, args, pairs = expression
    return _function(name)(*(evaluated(a, x, model) for a in args), **dict(pairs))


def _function(name: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = getattr(F, name, None) or getattr(torch, name)
    return found


def curve(builder: ProgramBuilder, node: Node, message: Slot, expression: Any, count: float = 1.0) -> Slot:
    """Write a function by quadrature; of `count` independent values the largest."""
    code = code_of(expression)
    if code is None or message.channels != node.channels:
        raise NoKernel
    return _kept(builder, op.CURVE, message, numbers=(count,), index=code)


def _kept(builder: ProgramBuilder, operation: int, message: Slot, **more: Any) -> Slot:
    scratch = builder.slot(_KEPT // 2 * message.channels)
    return builder.write(operation, builder.slot(message.channels), message, scratch, **more)


def _prelu(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    return propagate.leaky_relu(inputs[0], parameter(model, node.name))


def _lower_prelu(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    return _kept(builder, op.LEAKY, inputs[0], **numbers_of(builder, node))


def numbers_of(builder: ProgramBuilder, node: Node) -> dict[str, Any]:
    """Return what a row says of one parameter, of a number for each channel or one for all."""
    number = builder.named(_seen(node.name))
    size = builder.shape(number).numel()
    if size not in (1, node.channels):
        raise NoKernel
    return {"shape": (node.channels, int(size > 1), 1), "tensors": (number,)}


def _seen(expression: Any) -> Any:
    """Return the path of a parameter that an expression shows in another shape, the expression itself otherwise."""
    inner = expression
    while isinstance(inner, Call) and inner.function.rpartition(".")[2] in _VIEWS:
        inner = inner.arguments[0]
    return inner.path if isinstance(inner, Parameter) else expression


RULES = {
    "elementwise": Rule(_elementwise, _lower_elementwise, trace=dict.fromkeys(ELEMENTWISE, function)),
    "fused": Rule(_fused, _lower_fused),
    "prelu": Rule(_prelu, _lower_prelu, trace={"prelu": prelu}),
}
