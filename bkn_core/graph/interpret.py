"""Interpret a graph: push messages from the normalization layers to the inputs of those that follow, node by node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bkn_core.filter import propagate, spatial
from bkn_core.filter.kalman import Gaussian
from bkn_core.graph.expressions import Call, Parameter
from bkn_core.graph.expressions import parameter as parameter
from bkn_core.graph.graph import Graph, Node

Leaf = Callable[[str], Gaussian]
Rule = Callable[[Node, list[Gaussian], nn.Module], Gaussian]

# Neighbouring positions are neither independent nor equal: k of them count as k^0.5 independent ones for a maximum and
# as k^0.4 for an average. Of the powers 0 (equal) to 1 (independent) these fit photographs best (docs/coverage.md).
MAXIMUM_POWER, AVERAGE_POWER = 0.5, 0.4

# Where a module keeps the moments of what it reads from the network input (see `input_moments`).
INPUT_MEAN, INPUT_COVARIANCE = "input_mean", "input_covariance"


def _convolution(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    bias, groups = node.options
    return propagate.convolution(
        inputs[0], parameter(model, node.name), parameter(model, bias) if bias else None, groups
    )


def _patches(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    bias, module = node.options
    path = f"{module}." if module else ""
    mean, covariance = parameter(model, path + INPUT_MEAN), parameter(model, path + INPUT_COVARIANCE)
    weight = parameter(model, node.name)
    return propagate.patches(weight, parameter(model, bias) if bias else None, mean, covariance)


def _measured(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    path = f"{node.name}." if node.name else ""
    covariance = parameter(model, path + INPUT_COVARIANCE)
    variance = covariance.diagonal() if covariance.dim() == 2 else covariance
    return Gaussian(parameter(model, path + INPUT_MEAN), variance)


def _hardtanh(message: Gaussian, low: float = -1.0, high: float = 1.0, **_: Any) -> Gaussian:
    return propagate.clipped(message, low, high)


def _leaky_relu(message: Gaussian, negative_slope: float = 0.01, **_: Any) -> Gaussian:
    return propagate.leaky_relu(message, negative_slope)


_FAR = 1e9  # instead of infinity, whose gradient would be no number


def _threshold(message: Gaussian, threshold: float, value: float) -> Gaussian:
    return propagate.thresholded(message, -_FAR, threshold, value)


def _hardshrink(message: Gaussian, lambd: float = 0.5) -> Gaussian:
    return propagate.thresholded(message, -lambd, lambd, 0.0)


# Activations with a closed form; every other elementwise function goes through quadrature.
CLOSED_FORMS: dict[str, Callable[..., Gaussian]] = {
    "relu": lambda message, **_: propagate.relu(message),
    "relu6": lambda message, **_: propagate.clipped(message, 0.0, 6.0),
    "hardtanh": lambda message, *a, **k: _hardtanh(message, *a[:2], **_renamed(k)),
    "threshold": _threshold,
    "hardshrink": _hardshrink,
    "leaky_relu": lambda message, *a, **k: _leaky_relu(message, *a[:1], **k),
}


def _renamed(options: dict[str, Any]) -> dict[str, Any]:
    names = {"min_val": "low", "max_val": "high"}
    return {names.get(key, key): value for key, value in options.items()}


def _function(name: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = getattr(F, name, None) or getattr(torch, name)
    return found


def _elementwise(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    name, args, pairs = node.options
    options = dict(pairs)
    if name in CLOSED_FORMS:
        return CLOSED_FORMS[name](inputs[0], *args, **options)
    return propagate.elementwise(inputs[0], lambda x: _function(name)(x, *args, **options))


def _max_pool(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    count, expression = node.options
    return spatial.maximum(inputs[0], lambda x: _expression(expression, x, model), count**MAXIMUM_POWER)


def _average(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    return Gaussian(inputs[0].mean, inputs[0].variance / node.options[0] ** AVERAGE_POWER)


def _fused(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    return propagate.elementwise(inputs[0], lambda x: _expression(node.options[0], x, model))


def _expression(expression: Any, x: Tensor, model: nn.Module) -> Any:
    """Evaluate a nested (name, arguments, options) on the points x; "x" stands for them."""
    if expression == "x":
        return x
    if isinstance(expression, Parameter | Call):
        return parameter(model, expression).flatten()
    if not isinstance(expression, tuple):
        return expression
    name, args, pairs = expression
    return _function(name)(*(_expression(a, x, model) for a in args), **dict(pairs))


def _gather(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    return propagate.gather(inputs[0], torch.tensor(node.options[0], device=inputs[0].mean.device))


def _scale(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    if node.options:
        return propagate.multiply(inputs[0], spatial.over_positions(parameter(model, node.name), *node.options))
    return propagate.affine(inputs[0], parameter(model, node.name).flatten(), 0.0)


def _shift(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    if node.options:
        return propagate.add(inputs[0], spatial.over_positions(parameter(model, node.name), *node.options))
    return propagate.affine(inputs[0], 1.0, parameter(model, node.name).flatten())


def _normalized(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    groups, eps, bias, is_pointwise = node.options
    message = spatial.normalized(inputs[0], groups, eps, is_pointwise=is_pointwise)
    if node.name:
        message = propagate.affine(message, parameter(model, node.name), 0.0)
    return propagate.affine(message, 1.0, parameter(model, bias)) if bias else message


def _transposed_convolution(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    bias, groups, stride, dilation = node.options
    return spatial.transposed_convolution(
        inputs[0],
        parameter(model, node.name),
        parameter(model, bias) if bias else None,
        groups=groups,
        stride=stride,
        dilation=dilation,
    )


def _prelu(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    return propagate.leaky_relu(inputs[0], parameter(model, node.name))


RULES: dict[str, Rule] = {
    "convolution": _convolution,
    "transposed_convolution": _transposed_convolution,
    "patches": _patches,
    "measured": _measured,
    "elementwise": _elementwise,
    "fused": _fused,
    "max_pool": _max_pool,
    "average": _average,
    "prelu": _prelu,
    "gather": _gather,
    "pass": lambda _, inputs, __: inputs[0],
    "scale": _scale,
    "normalized": _normalized,
    "shift": _shift,
    "affine": lambda node, inputs, _: propagate.affine(inputs[0], *node.options),
    "add": lambda _, inputs, __: propagate.add(*inputs),
    "multiply": lambda _, inputs, __: propagate.multiply(*inputs),
    "concatenate": lambda _, inputs, __: propagate.concatenate(inputs),
}


def _joined(_: Node, inputs: list[Gaussian], __: nn.Module) -> Gaussian:
    first, second = inputs
    if first.mean.shape[-1] == second.mean.shape[-1] and first.variance.dim() == second.variance.dim():
        return propagate.add(first, second)
    return first if first.mean.shape[-1] > 1 else second


# The learned transition stands for all that lies between two layers, so only branches are combined.
STRUCTURE: dict[str, Rule] = {
    **dict.fromkeys(RULES, lambda _, inputs, __: inputs[0]),
    "patches": _patches,
    "measured": _measured,
    "add": _joined,
    "concatenate": lambda _, inputs, __: _side_by_side(inputs),
}


def _side_by_side(inputs: list[Gaussian]) -> Gaussian:
    if all(message.variance.dim() == message.mean.dim() for message in inputs):
        return propagate.concatenate(inputs)
    inputs = [_matrix_form(message) for message in inputs]
    groups = max(len(message.mean) for message in inputs)
    blocks = [message.variance.expand(groups, -1, -1).unbind() for message in inputs]
    variance = torch.stack([torch.block_diag(*parts) for parts in zip(*blocks, strict=True)])  # type: ignore[no-untyped-call]
    return Gaussian(torch.cat([message.mean.expand(groups, -1) for message in inputs], -1), variance)


def _matrix_form(message: Gaussian) -> Gaussian:
    """Give a message that holds for all groups, or only variances, a group dimension and a covariance matrix."""
    variance = message.variance
    if variance.dim() == message.mean.dim():
        variance = torch.diag_embed(variance)
    return (
        message._replace(variance=variance) if message.mean.dim() > 1 else Gaussian(message.mean[None], variance[None])
    )


class Interpreter:
    """The values of a graph's nodes, each computed once, when it is first asked for.

    Args:
        graph: the nodes.
        model: the model whose parameters the rules read.
        leaf: the message of a normalization layer, by name.
        rules: `RULES`, or `STRUCTURE` for learned transitions.
    """

    def __init__(self, graph: Graph, model: nn.Module, leaf: Leaf, rules: dict[str, Rule] = RULES) -> None:
        self.graph, self.model, self.leaf, self.rules = graph, model, leaf, rules
        self.results: dict[int, Gaussian] = {}

    def node(self, number: int) -> Gaussian:
        """Return the value of a node; iterative, since residual streams are deeper than Python's stack."""
        waiting = [number]
        while waiting:
            current = waiting[-1]
            node = self.graph.nodes[current]
            missing = [i for i in node.inputs if i not in self.results]
            if current in self.results or not missing:
                waiting.pop()
                if current not in self.results:
                    self.results[current] = self._evaluated(node)
            else:
                waiting.extend(missing)
        return self.results[number]

    def _evaluated(self, node: Node) -> Gaussian:
        if node.operation == "norm":
            return self.leaf(str(node.name))
        return self.rules[node.operation](node, [self.results[i] for i in node.inputs], self.model)
