"""Convolutions and linear layers: of features, or of the network input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bkn_core.filter import propagate, spatial
from bkn_core.filter.kalman import Gaussian
from bkn_core.graph import instructions as op
from bkn_core.graph.expressions import Call, Parameter, parameter, sources
from bkn_core.graph.graph import GraphBuilder, Node
from bkn_core.graph.input_moments import INPUT_COVARIANCE, INPUT_MEAN
from bkn_core.graph.instructions import NoKernel, ProgramBuilder, Slot
from bkn_core.graph.rules.rule import Rule
from bkn_core.graph.values import Running, Step, Value

_STRAIGHT = ("conv1d", "conv2d", "conv3d", "linear")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def linear_map(builder: GraphBuilder, step: Step, *_: Value) -> Value:
    """A convolution, transposed convolution or linear map."""
    stack = builder.stack
    x, weight, bias = (step.argument(i, n) for i, n in enumerate(("input", "weight", "bias")))
    value = step.known(x)
    path = _path(step, weight, "weight", stack)
    bias_path = "" if bias is None else _path(step, bias, "bias", stack)
    if path is None or bias_path is None or value is None:
        return Value(reason=f"{step.name} whose weight is not a parameter")
    words = (path if isinstance(path, str) else sources(path)[0]).removesuffix(".weight")
    channels = weight.shape[1] * _groups(step) if step.name in _TRANSPOSED else weight.shape[0]
    dimension = step.outputs[0].dim() - 1 if step.name == "linear" else 1
    rest: dict[str, Any] = {"dimension": dimension, "name": path}
    if value.is_input:
        if _groups(step) > 1 or step.name in _TRANSPOSED or not _is_own_layer(path, x, stack):
            return Value(reason=f"{step.name} of the network input in a form that is not measured")
        options: tuple[Any, ...] = (bias_path, stack[-1].name)
        return builder.write("patches", [], channels, options=options, words=f"input -> {words}", **rest)
    expected = x.dim() - 1 if step.name == "linear" else 1
    if value.numbers is not None or value.dimension != expected or x.dim() != step.outputs[0].dim():
        return Value(reason=f"{step.name} across something else than channels")
    rest |= {"words": words, "options": (bias_path, _groups(step))}
    if step.name in _TRANSPOSED:
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


def _is_own_layer(path: str | Call, x: Tensor, stack: Sequence[Running]) -> bool:
    """Whether a convolution or linear layer applies its own weight to the very tensor that it was called with."""
    if not stack:
        return False
    name, module, given = stack[-1]
    known = isinstance(module, nn.modules.conv._ConvNd) or (isinstance(module, nn.Linear) and x.dim() == 2)
    pads_itself = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # in a way that measuring repeats
    return known and (given is x or pads_itself) and path == f"{name}.weight".lstrip(".")


def _path(step: Step, tensor: Tensor, attribute: str, stack: Sequence[Running]) -> str | Call | None:
    """Name a weight: its parameter or buffer, the attribute of the running module that computes it, or how it is."""
    value = step.known(tensor)
    if value is not None and isinstance(value.parameter, Parameter):
        return value.parameter.path
    if stack and nn.utils.parametrize.is_parametrized(stack[-1].module, attribute):
        return f"{stack[-1].name}.{attribute}".lstrip(".")
    return None if value is None else value.parameter


def _convolution(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    bias, groups = node.options
    return propagate.convolution(inputs[0], parameter(model, node.name), _bias(model, bias), groups)


def _lower_convolution(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    bias, groups = node.options
    weight = builder.named(node.name)
    channels, inner, *taps = builder.shape(weight)
    if inner * groups != inputs[0].channels or channels != node.channels:
        raise NoKernel
    shape = (inner * groups, torch.Size(taps).numel(), groups)
    tensors = (weight, builder.named(bias))
    return builder.write(op.CONVOLUTION, builder.slot(channels), inputs[0], shape=shape, tensors=tensors)


def _transposed_convolution(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    bias, groups, stride, dilation = node.options
    weight, more = parameter(model, node.name), {"groups": groups, "stride": stride, "dilation": dilation}
    return spatial.transposed_convolution(inputs[0], weight, _bias(model, bias), **more)


def _lower_transposed_convolution(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    bias, groups, stride, dilation = node.options
    weight = builder.named(node.name)
    width, inner, *taps = builder.shape(weight)
    if width != inputs[0].channels or inner * groups != node.channels:
        raise NoKernel
    table = spatial.phases(torch.empty(1, 1, *taps), stride, dilation)
    more = {"numbers": (float(table.shape[1]),), "index": tuple(table.argmax(1).tolist())}
    tensors, shape = (weight, builder.named(bias)), (width, table.shape[0], groups)
    return builder.write(op.TRANSPOSED, builder.slot(node.channels), inputs[0], shape=shape, tensors=tensors, **more)


def _patches(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    bias, module = node.options
    path = f"{module}." if module else ""
    mean, covariance = parameter(model, path + INPUT_MEAN), parameter(model, path + INPUT_COVARIANCE)
    return propagate.patches(parameter(model, node.name), _bias(model, bias), mean, covariance)


def _lower_patches(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    bias, module = node.options
    weight = builder.named(node.name)
    mean, covariance = builder.tensor(module, INPUT_MEAN), builder.tensor(module, INPUT_COVARIANCE)
    width, taps = builder.shape(weight)[1:].numel(), builder.shape(weight)[2:].numel()
    if builder.shape(mean) != (width,) or builder.shape(weight)[0] != node.channels:
        raise NoKernel
    is_matrix = int(len(builder.shape(covariance)) == 2)
    tensors = (weight, builder.named(bias), mean, covariance)
    return builder.write(op.PATCHES, builder.slot(node.channels), shape=(width, taps, is_matrix), tensors=tensors)


def _bias(model: nn.Module, path: Any) -> Tensor | None:
    return parameter(model, path) if path else None


def _behind(node: Node, inputs: list[str]) -> str:
    return f"{inputs[0]} -> {node.words}"


RULES = {
    "convolution": Rule(_convolution, _lower_convolution, _behind, dict.fromkeys(_STRAIGHT, linear_map)),
    "transposed_convolution": Rule(
        _transposed_convolution,
        _lower_transposed_convolution,
        _behind,
        dict.fromkeys(_TRANSPOSED, linear_map),
    ),
    "patches": Rule(_patches, _lower_patches, lambda node, _: node.words, join=_patches),
}
