"""Nodes of functions that move values, or mix those of different positions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from bkn_core.graph.builder import GraphBuilder
from bkn_core.graph.expressions import name_or_call
from bkn_core.graph.names import OVER_POSITIONS, REARRANGING
from bkn_core.graph.values import Step, Value, find_channels, number_channels, tensors


def over_positions(builder: GraphBuilder, step: Step, value: Value) -> Value:
    """Pooling, padding or resizing."""
    rank = step.outputs[0].dim()
    acted = OVER_POSITIONS[step.name]
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
    rest: dict[str, Any] = {"dimension": 1, "options": (count, expression), "words": "max_pool"}
    return builder.write("max_pool", [root], channels, **rest).node


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


def normalized(builder: GraphBuilder, step: Step, value: Value) -> Value:
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
    rest: dict[str, Any] = {"dimension": value.dimension, "name": name, "options": options, "words": step.name}
    return builder.write("normalized", [value.node], channels, **rest)


def mean(builder: GraphBuilder, step: Step, value: Value) -> Value:
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


def concatenate(builder: GraphBuilder, step: Step, values: list[Value]) -> Value:
    """Tensors beside each other, along the channels or along something else."""
    dim = step.argument(1, "dim")
    assert values[0].tensor is not None
    dim = (0 if dim is None else dim) % values[0].tensor.dim()
    if len(values) != len(step.tensors):
        return Value(reason="cat with tensors that are not features")
    if all(v.dimension == dim for v in values):
        if len({v.node for v in values}) < len(values):
            return Value(reason="cat of the same features twice")  # far from independent
        channels = sum(builder.channels(v) for v in values)
        return builder.write("concatenate", [v.node for v in values], channels, dimension=dim)
    if len({(builder.before_passing(v.node), v.dimension) for v in values}) == 1:
        return builder.passed(values[0])
    return Value(reason="cat along another dimension than the channels")


def moved(builder: GraphBuilder, step: Step, value: Value) -> list[Value]:
    """Replay a function that only moves values on channel numbers and read off where each channel went."""
    numbers = moved_numbers(step, value, number_channels(value, builder.channels(value)))
    if not numbers:
        return [Value(reason=f"{step.name} of something else than features")] * len(step.outputs)
    results = [placed(builder, value, result) for result in numbers]
    if step.name in REARRANGING:
        return results
    # Values that were picked by position are others now, and have a node of their own.
    return [builder.passed(result) if result.node == value.node else result for result in results]


def moved_numbers(step: Step, value: Value, numbers: Tensor) -> list[Tensor]:
    """Replay a function that only moves values on numbers; nothing where it is not the values that it moves."""
    args, kwargs = step.arguments
    tensor = value.tensor
    if not args or tensor is None or args[0] is not tensor:
        return []
    if tensor.is_meta and step.name == "getitem" and tensors((args[1:], kwargs)):
        return []  # an index of which only the shape is known
    results = pytree.tree_leaves(step.function(numbers, *args[1:], **kwargs))
    return [result for result in results if isinstance(result, Tensor)]


def placed(builder: GraphBuilder, value: Value, numbers: Tensor) -> Value:
    """Read off where a function put the channels of a value."""
    found = find_channels(numbers, builder.channels(value))
    if isinstance(found, str):
        return Value(reason=found)
    if found is None:
        return Value(node=value.node, numbers=numbers)
    dimension, index = found
    if index == tuple(range(builder.channels(value))):
        return Value(node=value.node, dimension=dimension)
    return builder.write("gather", [value.node], len(index), dimension=dimension, options=(index,))
