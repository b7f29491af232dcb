"""A graph while it is being built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bkn_core.graph.graph import Node
from bkn_core.graph.values import Value

AFFINE = ("affine", "scale", "shift")


class GraphBuilder:
    """Nodes so far and, for elementwise nodes, the node that they are a function of and which function."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.origins: dict[int, tuple[int, Any]] = {}
        self.read_numbers: set[float] = set()  # that the forward took out of tensors: others the next time

    def write(self, operation: str, inputs: Sequence[int], channels: int, *, dimension: int, **rest: Any) -> Value:
        """Append a node and return the value of its result."""
        self.nodes.append(Node(operation, tuple(inputs), channels, **rest))
        return Value(node=len(self.nodes) - 1, dimension=dimension)

    def channels(self, value: Value) -> int:
        """Count the channels of a value."""
        return self.nodes[value.node].channels

    def passed(self, value: Value) -> Value:
        """Pass the moments on under a new node: the values are others now, which must not cancel in a difference."""
        result = self.write("pass", [value.node], self.channels(value), dimension=value.dimension)
        result.numbers = value.numbers
        return result

    def averaged(self, value: Value, count: float) -> Value:
        """Write the average over `count` positions."""
        if count <= 1:
            return self.passed(value)
        rest: dict[str, Any] = {"dimension": value.dimension, "options": (count,), "words": "average"}
        result = self.write("average", [value.node], self.channels(value), **rest)
        result.numbers = value.numbers
        return result

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
        while self.nodes[node].operation in AFFINE:
            node = self.nodes[node].inputs[0]
        return node not in self.origins
