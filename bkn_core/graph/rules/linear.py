"""Nodes of convolutions and linear layers: of features, or of the network input."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bkn_core.graph.builder import GraphBuilder
from bkn_core.graph.expressions import Call, Parameter, sources
from bkn_core.graph.names import TRANSPOSED
from bkn_core.graph.values import Running, Step, Value


def linear_map(builder: GraphBuilder, step: Step, stack: list[Running]) -> Value:
    """A convolution, transposed convolution or linear map."""
    x, weight, bias = (step.argument(i, n) for i, n in enumerate(("input", "weight", "bias")))
    value = step.known(x)
    path = _path(step, weight, "weight", stack)
    bias_path = "" if bias is None else _path(step, bias, "bias", stack)
    if path is None or bias_path is None or value is None:
        return Value(reason=f"{step.name} whose weight is not a parameter")
    words = (path if isinstance(path, str) else sources(path)[0]).removesuffix(".weight")
    channels = weight.shape[1] * _groups(step) if step.name in TRANSPOSED else weight.shape[0]
    dimension = step.outputs[0].dim() - 1 if step.name == "linear" else 1
    rest: dict[str, Any] = {"dimension": dimension, "name": path}
    if value.is_input:
        if _groups(step) > 1 or step.name in TRANSPOSED or not _is_own_layer(path, x, stack):
            return Value(reason=f"{step.name} of the network input in a form that is not measured")
        options: tuple[Any, ...] = (bias_path, stack[-1].name)
        return builder.write("patches", [], channels, options=options, words=f"input -> {words}", **rest)
    expected = x.dim() - 1 if step.name == "linear" else 1
    if value.numbers is not None or value.dimension != expected or x.dim() != step.outputs[0].dim():
        return Value(reason=f"{step.name} across something else than channels")
    rest |= {"words": words, "options": (bias_path, _groups(step))}
    if step.name in TRANSPOSED:
        rest["options"] += (_per_axis(step, 3, "stride", weight), _per_axis(step, 7, "dilation", weight))
        return builder.write("transposed_convolution", [value.node], channels, **rest)
    return builder.write("convolution", [value.node], channels, **rest)


def _groups(step: Step) -> int:
    return 1 if step.name == "linear" else int(step.argument(6, "groups") or 1)


def _per_axis(step: Step, position: int, name: str, weight: Tensor) -> tuple[int, ...]:
    given = step.argument(position, name)
    axes = weight.dim() - 2
    if given is None or isinstance(given, int):
        return (given or 1,) * axes
    return tuple(given) * (axes if len(given) == 1 else 1)


def _is_own_layer(path: str | Call, x: Tensor, stack: list[Running]) -> bool:
    """Whether a convolution or linear layer applies its own weight to the very tensor that it was called with."""
    if not stack:
        return False
    name, module, given = stack[-1]
    known = isinstance(module, nn.modules.conv._ConvNd) or (isinstance(module, nn.Linear) and x.dim() == 2)
    pads_itself = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # in a way that measuring repeats
    return known and (given is x or pads_itself) and path == f"{name}.weight".lstrip(".")


def _path(step: Step, tensor: Tensor, attribute: str, stack: list[Running]) -> str | Call | None:
    """Name a weight: its parameter or buffer, the attribute of the running module that computes it, or how it is."""
    value = step.known(tensor)
    if value is not None and isinstance(value.parameter, Parameter):
        return value.parameter.path
    if stack and nn.utils.parametrize.is_parametrized(stack[-1].module, attribute):
        return f"{stack[-1].name}.{attribute}".lstrip(".")
    return None if value is None else value.parameter
