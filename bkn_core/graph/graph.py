"""What lies between a model's normalization layers: nodes in a row, plain data without tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from bkn_core.graph.values import Running, Value

REPEATED = "called more than once in a forward"
_AFFINE = ("affine", "scale", "shift")


@dataclasses.dataclass(frozen=True)
class Node:
    """One step: an operation on the results of earlier nodes.

    Args:
        operation: name of a rule in `operations.RULES`.
        inputs: numbers of the nodes it reads.
        channels: channels of its result.
        name: the module (or parameter) that the rule reads, by its path in the model, or what is computed from
            parameters (`expressions.Call`).
        options: plain values that the rule needs.
        words: how the report calls it.
    """

    operation: str
    inputs: tuple[int, ...] = ()
    channels: int = 0
    name: Any = ""
    options: tuple[Any, ...] = ()
    words: str = ""


@dataclasses.dataclass(frozen=True)
class Graph:
    """The nodes of a model and, for each normalization layer, the node that holds its prior.

    Args:
        nodes: in an order in which every node follows what it reads.
        priors: node number of each layer that has a prior, by the layer's name, in forward order.
        reasons: why a layer has none, by name.
    """

    nodes: tuple[Node, ...]
    priors: dict[str, int]
    reasons: dict[str, str]

    def needed(self, numbers: Iterable[int]) -> set[int]:
        """Return the numbers of all nodes that these nodes depend on, themselves included."""
        found: set[int] = set()
        waiting = list(numbers)
        while waiting:
            number = waiting.pop()
            if number not in found:
                found.add(number)
                waiting.extend(self.nodes[number].inputs)
        return found

    def only(self, priors: dict[str, int], reasons: dict[str, str]) -> Graph:
        """Keep these priors and the nodes that they need, renumbered."""
        kept = sorted(self.needed(priors.values()))
        new = {old: i for i, old in enumerate(kept)}
        nodes = tuple(
            dataclasses.replace(self.nodes[old], inputs=tuple(new[i] for i in self.nodes[old].inputs)) for old in kept
        )
        return Graph(nodes, {name: new[number] for name, number in priors.items()}, reasons)


class GraphBuilder:
    """Nodes so far and, for elementwise nodes, the node that they are a function of and which function.

    Args:
        stack: the modules that are running, outermost first.
    """

    def __init__(self, stack: Sequence[Running]) -> None:
        self.stack = stack
        self.nodes: list[Node] = []
        self.origins: dict[int, tuple[int, Any]] = {}
        self.read_numbers: set[float] = set()  # that the forward took out of tensors: others the next time

    def write(self, operation: str, inputs: Sequence[int], channels: int, *, dimension: int, **rest: Any) -> Value:
        """Append a node and return the value of its result."""
        self.nodes.append(Node(operation, tuple(inputs), channels, **rest))
        return Value(node=len(self.nodes) - 1, dimension=dimension)

    def follow(self, operation: str, value: Value, node: int | None = None, **rest: Any) -> Value:
        """Append a node that leaves the channels of a value where they are, and reads it, or another node."""
        inputs = [value.node if node is None else node]
        result = self.write(operation, inputs, self.channels(value), dimension=value.dimension, **rest)
        result.numbers = value.numbers
        return result

    def apply(self, operation: str, value: Value, expression: Any, **rest: Any) -> Value:
        """Append a function of each value by itself, which is an expression of the origin of what it reads.

        A function of a function of a Gaussian is one function of it.
        """
        root = self.origin(value.node)[0]
        if self.is_gaussian(value.node):
            result = self.follow(operation, value, **rest)
        else:
            result = self.follow("fused", value, root, options=(expression,), words=rest["words"])
        self.origins[result.node] = (root, expression)
        return result

    def channels(self, value: Value) -> int:
        """Count the channels of a value."""
        return self.nodes[value.node].channels

    def passed(self, value: Value) -> Value:
        """Pass the moments on under a new node: the values are others now, which must not cancel in a difference."""
        return self.follow("pass", value)

    def averaged(self, value: Value, count: float) -> Value:
        """Write the average over `count` positions."""
        return self.passed(value) if count <= 1 else self.follow("average", value, options=(count,), words="average")

    def before_passing(self, node: int) -> int:
        """Return the node whose moments a node passes on."""
        while self.nodes[node].operation == "pass":
            node = self.nodes[node].inputs[0]
        return node

    def origin(self, node: int) -> tuple[int, Any]:
        """Return the node that this one is an elementwise function of, and the function ("x" is the identity)."""
        return self.origins.get(node, (node, "x"))

    def is_gaussian(self, node: int) -> bool:
        """Whether a node is no elementwise function of another, or an affine one."""
        while self.nodes[node].operation in _AFFINE:
            node = self.nodes[node].inputs[0]
        return node not in self.origins


def supported(graph: Graph, model: nn.Module, chosen: set[str], *, is_static: bool, has_input_prior: bool) -> Graph:
    """Keep the priors of the chosen layers, and of those only what can be computed.

    Args:
        graph: of the whole model.
        model: whose graph it is.
        chosen: the layers that are converted.
        is_static: whether messages depend on parameters only, not on the posteriors of a forward.
        has_input_prior: whether the moments of the network input are given.
    """
    mute = set() if is_static else _without_posterior(graph, model, chosen)
    priors, reasons = {}, {name: reason for name, reason in graph.reasons.items() if name in chosen}
    for name, number in graph.priors.items():
        needed = [graph.nodes[i] for i in sorted(graph.needed([number]))]
        reads_input = any(node.operation in ("patches", "measured") for node in needed)
        reads_mute = next((node.name for node in needed if node.operation == "norm" and node.name in mute), None)
        if name not in chosen:
            continue
        if reads_mute is not None:
            reasons[name] = (
                f"reads {reads_mute}, which has no one posterior in a forward (message='normalized' needs none)"
            )
        elif reads_input and not has_input_prior:
            reasons[name] = "reads the network input, whose moments were not given (input_prior)"
        else:
            priors[name] = number
    return graph.only(priors, reasons)


def _without_posterior(graph: Graph, model: nn.Module, chosen: set[str]) -> set[str]:
    """Return the layers of which a forward has no posterior, or several."""
    repeated = {name for name, reason in graph.reasons.items() if reason == REPEATED and name in chosen}
    others = {node.name for node in graph.nodes if node.operation == "norm" and node.name not in chosen}
    return repeated | {name for name in others if model.get_submodule(name).running_mean is None}
