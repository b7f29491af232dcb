"""What lies between a model's normalization layers: nodes in a row, plain data without tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

_LONGEST_WORDS = 160


@dataclasses.dataclass(frozen=True)
class Node:
    """One step: an operation on the results of earlier nodes.

    Args:
        operation: name of a rule in `interpret.RULES`, "unknown" where there is none.
        inputs: numbers of the nodes it reads.
        channels: channels of its result.
        name: the module (or parameter) that the rule reads, by its path in the model, or what is computed from
            parameters (`expressions.Call`).
        options: plain values that the rule needs.
        words: how the report calls it; for an unknown node the reason.
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

    def __str__(self) -> str:
        """Print as a listing, one node a row."""
        rows = [f"%{i} = {node.operation}({self._arguments(node)})" for i, node in enumerate(self.nodes)]
        rows += [f"prior of {name}: %{number}" for name, number in self.priors.items()]
        return "\n".join(rows + [f"no prior for {name}: {reason}" for name, reason in self.reasons.items()])

    @staticmethod
    def _arguments(node: Node) -> str:
        return ", ".join([*(f"%{number}" for number in node.inputs), *([str(node.name)] if node.name else [])])

    def words(self, number: int) -> str:
        """Say what a node computes, such as `relu(bn1) -> conv2`."""
        texts: dict[int, str] = {}
        for i in sorted(self.needed([number])):
            texts[i] = _words(self.nodes[i], [texts[j] for j in self.nodes[i].inputs])
        return texts[number]

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


def _words(node: Node, inputs: list[str]) -> str:
    if node.operation in ("convolution", "transposed_convolution"):
        text = f"{inputs[0]} -> {node.words}"
    elif node.operation == "add":
        text = " + ".join(inputs)
    elif node.operation == "multiply":
        text = " * ".join(f"({text})" if " + " in text else text for text in inputs)
    elif node.operation == "scale":
        text = f"{node.words} * ({inputs[0]})" if " " in inputs[0] else f"{node.words} * {inputs[0]}"
    elif node.operation == "concatenate":
        text = f"[{', '.join(inputs)}]"
    elif node.operation == "max_pool":
        text = f"max_pool({_function_words(node.options[1], inputs[0])})"
    elif node.operation in ("norm", "patches", "measured"):
        text = node.words
    elif node.operation in ("pass", "average", "gather", "affine", "shift"):
        text = inputs[0]
    else:
        text = f"{node.words}({', '.join(inputs)})"
    if len(text) <= _LONGEST_WORDS:
        return text
    return f"{text[: _LONGEST_WORDS // 2]} ... {text[-_LONGEST_WORDS // 2 :]}"


def _function_words(expression: Any, text: str) -> str:
    """Say what a nested (name, arguments, options) computes of a text; "x" stands for it."""
    if expression == "x":
        return text
    if not isinstance(expression, tuple):
        return str(expression)
    name, args, _ = expression
    return f"{name}({', '.join(_function_words(a, text) for a in args)})"
