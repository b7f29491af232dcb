"""All operations of a graph, the one place that holds every rule, and what is done with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from bkn_core.filter.kalman import Gaussian
from bkn_core.graph import instructions as op
from bkn_core.graph.expressions import parameter
from bkn_core.graph.graph import Graph, Node
from bkn_core.graph.input_moments import INPUT_COVARIANCE, INPUT_MEAN
from bkn_core.graph.instructions import NoKernel, ProgramBuilder, Slot
from bkn_core.graph.rules import arithmetic, linear, moving, pointwise, spatial
from bkn_core.graph.rules.rule import Rule, Trace

Leaf = Callable[[str], Gaussian]
_LONGEST_WORDS = 160


def _lower_norm(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    tensors = (builder.tensor(node.name, "weight"), builder.tensor(node.name, "bias"))
    return builder.write(op.NORM, builder.slot(node.channels), tensors=tensors)


def _measured(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    path = f"{node.name}." if node.name else ""
    covariance = parameter(model, path + INPUT_COVARIANCE)
    variance = covariance.diagonal() if covariance.dim() == 2 else covariance
    return Gaussian(parameter(model, path + INPUT_MEAN), variance)


def _lower_measured(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    mean, covariance = builder.tensor(node.name, INPUT_MEAN), builder.tensor(node.name, INPUT_COVARIANCE)
    step = node.channels + 1 if len(builder.shape(covariance)) == 2 else 1
    return builder.write(op.GIVEN, builder.slot(node.channels), shape=(0, step, 1), tensors=(mean, covariance))


def _lower_given(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    first = 2 * builder.given.index(node.name)
    return builder.write(op.GIVEN, builder.slot(node.channels), shape=(0, 1, 1), tensors=(first, first + 1))


def _named(node: Node, _: list[str]) -> str:
    return node.words


RULES: dict[str, Rule] = {
    "norm": Rule(None, _lower_norm, _named),
    "given": Rule(None, _lower_given),
    "measured": Rule(_measured, _lower_measured, _named, join=_measured),
    **linear.RULES,
    **pointwise.RULES,
    **arithmetic.RULES,
    **spatial.RULES,
    **moving.RULES,
}
FUNCTIONS: dict[str, Trace] = {name: trace for rule in RULES.values() for name, trace in rule.trace.items()}


def lower(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    """Write a node for the CPU kernels, and return the slot of its result.

    Raises:
        NoKernel: they do not know it.
    """
    rule = RULES[node.operation]
    if rule.lower is None:
        raise NoKernel
    return rule.lower(builder, node, inputs)


def describe(graph: Graph, number: int) -> str:
    """Say what a node computes, such as `relu(bn1) -> conv2`."""
    texts: dict[int, str] = {}
    for i in sorted(graph.needed([number])):
        node = graph.nodes[i]
        text = RULES[node.operation].describe(node, [texts[j] for j in node.inputs])
        half = _LONGEST_WORDS // 2
        texts[i] = text if len(text) <= _LONGEST_WORDS else f"{text[:half]} ... {text[-half:]}"
    return texts[number]


def evaluate(node: Node, inputs: list[Gaussian], model: nn.Module, *, is_joined: bool = False) -> Gaussian:
    """Return the moments of a node's result, in PyTorch."""
    rule = RULES[node.operation]
    found = rule.join if is_joined else rule.evaluate
    assert found is not None, f"the moments of {node.operation} are given"
    return found(node, inputs, model)


class Interpreter:
    """The values of a graph's nodes, each computed once, when it is first asked for.

    Args:
        graph: the nodes.
        model: the model whose parameters the rules read.
        leaf: the message of a normalization layer, by name.
        is_joined: for learned transitions, which stand for all that lies between two layers: combine branches only.
    """

    def __init__(self, graph: Graph, model: nn.Module, leaf: Leaf, *, is_joined: bool = False) -> None:
        self.graph, self.model, self.leaf, self.is_joined = graph, model, leaf, is_joined
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
        inputs = [self.results[i] for i in node.inputs]
        return evaluate(node, inputs, self.model, is_joined=self.is_joined)
