"""Functions over positions: pools, means, resizing, normalization of each image by itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from bkn_core.filter import propagate, spatial
from bkn_core.filter.kalman import Gaussian
from bkn_core.graph import instructions as op
from bkn_core.graph.expressions import name_or_call, parameter
from bkn_core.graph.graph import GraphBuilder, Node
from bkn_core.graph.instructions import ProgramBuilder, Slot
from bkn_core.graph.rules.pointwise import curve, evaluated
from bkn_core.graph.rules.rule import Rule, first, unsaid
from bkn_core.graph.values import Step, Value

# Neighbouring positions are neither independent nor equal: k of them count as k^0.5 independent ones for a maximum and
# as k^0.4 for an average. Of the powers 0 (equal) to 1 (independent) these fit photographs best (docs/coverage.md).
MAXIMUM_POWER, AVERAGE_POWER = 0.5, 0.4

# How many trailing dimensions a function acts on; None is all behind the channels. Padding and resizing pass the
# moments on: padding lowers both at the border, resizing mixes neighbours; the layer's inflation has to see to that.
_POOLS = {f"{kind}_pool{n}d": n for kind in ("avg", "max", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)}
_PASSING = ("interpolate", "upsample", "pad")
_ACTED: dict[str, int | None] = {**_POOLS, **dict.fromkeys(_PASSING)}
_MAXIMA = ("x", ("relu", ("x",), ()))  # what max pooling pools without code: a Gaussian, or a rectified one


def over_positions(builder: GraphBuilder, step: Step, value: Value, *_: Value) -> Value:
    """Pooling, padding or resizing."""
    rank = step.outputs[0].dim()
    acted = _ACTED[step.name]
    if step.name == "pad":
        sides = list(step.argument(1, "pad"))
        while sides and not any(sides[-2:]):
            sides = sides[:-2]
        acted = len(sides) // 2
        if value.dimension >= rank - acted and not any(sides[2 * (rank - 1 - value.dimension) :][:2]):
            acted = 0  # the channels themselves are not padded
    elif acted is None:
        acted = rank - 2
    if value.tensor is None or rank != value.tensor.dim() or value.dimension >= rank - acted:
        return Value(reason=f"{step.name} across channels")
    count = _window(step, value.tensor)
    if "max" in step.name and count > 1:
        return Value(node=_maximum(builder, value.node, count), dimension=value.dimension)
    return builder.averaged(value, count) if "avg" in step.name else builder.passed(value)


def _maximum(builder: GraphBuilder, node: int, count: float) -> int:
    """Write the maximum of the function of a Gaussian that a node is; of joined nodes, of each by itself."""
    operation, inputs, channels = (getattr(builder.nodes[node], n) for n in ("operation", "inputs", "channels"))
    if operation == "concatenate":
        parts = [_maximum(builder, part, count) for part in inputs]
        return builder.write("concatenate", parts, channels, dimension=1).node
    root, expression = builder.origin(node)
    options = (count, expression)
    return builder.write("max_pool", [root], channels, dimension=1, options=options, words="max_pool").node


def _window(step: Step, tensor: Tensor) -> float:
    """Count the positions that each result of a pooling function reads."""
    if step.name.startswith("adaptive"):
        return tensor.numel() / max(step.outputs[0].numel(), 1)
    if "pool" not in step.name:
        return 1.0
    size = step.argument(1, "kernel_size")
    axes = int(step.name[-2])  # avg_pool2d
    sizes = (size,) * axes if isinstance(size, int) else tuple(size) * (axes if len(size) == 1 else 1)
    return float(math.prod(sizes))


def normalized(builder: GraphBuilder, step: Step, value: Value, *_: Value) -> Value:
    """Layer, group or instance normalization."""
    channels = builder.channels(value)
    assert value.tensor is not None
    is_layer = step.name == "layer_norm"
    at, groups = {
        "layer_norm": ((2, 3, 4), 1),
        "group_norm": ((2, 3, 4), step.argument(1, "num_groups")),
        "instance_norm": ((3, 4, 7), channels),
    }[step.name]
    fits = value.dimension == (value.tensor.dim() - 1 if is_layer else 1)
    if not fits or (is_layer and tuple(step.argument(1, "normalized_shape")) != (channels,)):
        return Value(reason=f"{step.name} across something else than channels")
    weight, bias = (step.argument(i, n) for i, n in zip(at, ("weight", "bias"), strict=False))
    eps = step.argument(at[2], "eps")
    known = [step.known(t) for t in (weight, bias) if t is not None]
    if any(v is None or v.parameter is None for v in known):
        return Value(reason=f"{step.name} whose weight is not a parameter")
    names = iter(name_or_call(v.parameter) for v in known if v is not None)
    name, bias = ("" if t is None else next(names) for t in (weight, bias))
    options = (groups, 1e-5 if eps is None else eps, bias, is_layer)
    return builder.follow("normalized", value, name=name, options=options, words=step.name)


def mean(builder: GraphBuilder, step: Step, value: Value, *_: Value) -> Value:
    """The mean over positions."""
    dims = step.argument(1, "dim")
    assert value.tensor is not None
    if dims is None:
        return Value(reason="mean over everything")
    rank = value.tensor.dim()
    gone = {d % rank for d in ([dims] if isinstance(dims, int) else dims)}
    if value.dimension in gone or 0 in gone:
        return Value(reason="mean over channels or images")
    kept = step.argument(2, "keepdim") or False
    dimension = value.dimension - (0 if kept else sum(d < value.dimension for d in gone))
    count = math.prod(value.tensor.shape[d] for d in gone)
    return dataclasses.replace(builder.averaged(value, count), dimension=dimension)


def _max_pool(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    count, expression = node.options
    return spatial.maximum(inputs[0], lambda x: evaluated(expression, x, model), count**MAXIMUM_POWER)


def _average(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    return Gaussian(inputs[0].mean, inputs[0].variance / node.options[0] ** AVERAGE_POWER)


def _normalized(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    groups, eps, bias, is_pointwise = node.options
    message = spatial.normalized(inputs[0], groups, eps, is_pointwise=is_pointwise)
    if node.name:
        message = propagate.affine(message, parameter(model, node.name), 0.0)
    return propagate.affine(message, 1.0, parameter(model, bias)) if bias else message


def _lower_max_pool(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    count, expression = node.options
    if expression not in _MAXIMA:
        return curve(builder, node, inputs[0], expression, count**MAXIMUM_POWER)
    numbers = (count**MAXIMUM_POWER, float(expression != "x"))
    return builder.write(op.MAX_POOL, builder.slot(node.channels), inputs[0], numbers=numbers)


def _lower_average(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    numbers = (node.options[0] ** -AVERAGE_POWER,)
    return builder.write(op.AVERAGE, builder.slot(node.channels), inputs[0], numbers=numbers)


def _pooled(node: Node, inputs: list[str]) -> str:
    return f"max_pool({_said(node.options[1], inputs[0])})"


def _said(expression: Any, text: str) -> str:
    """Say what a nested (name, arguments, options) computes of a text; "x" stands for it."""
    if expression == "x":
        return text
    if not isinstance(expression, tuple):
        return str(expression)
    name, args, _ = expression
    return f"{name}({', '.join(_said(a, text) for a in args)})"


RULES = {
    "max_pool": Rule(
        _max_pool, _lower_max_pool, _pooled, dict.fromkeys((n for n in _POOLS if "max" in n), over_positions)
    ),
    "average": Rule(
        _average,
        _lower_average,
        unsaid,
        {**dict.fromkeys((n for n in _POOLS if "avg" in n), over_positions), "mean": mean},
    ),
    "pass": Rule(
        first,
        lambda _, __, inputs: inputs[0],
        unsaid,
        dict.fromkeys(_PASSING, over_positions),
    ),
    "normalized": Rule(_normalized, trace=dict.fromkeys(("layer_norm", "group_norm", "instance_norm"), normalized)),
}
