"""What there is to say about one operation of a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from bkn_core.filter.kalman import Gaussian
from bkn_core.graph.graph import Node
from bkn_core.graph.instructions import ProgramBuilder, Slot
from bkn_core.graph.values import Value

Trace = Callable[..., Value | list[Value]]  # of the builder, the step and the values of its features
Evaluate = Callable[[Node, list[Gaussian], nn.Module], Gaussian]
Describe = Callable[[Node, list[str]], str]
Lower = Callable[[ProgramBuilder, Node, Sequence[Slot]], Slot]


def first(_: Node, inputs: list[Gaussian], __: nn.Module) -> Gaussian:
    """Pass the moments on."""
    return inputs[0]


def called(node: Node, inputs: list[str]) -> str:
    """Say it as a call."""
    return f"{node.words}({', '.join(inputs)})"


def unsaid(_: Node, inputs: list[str]) -> str:
    """Say what is read alone."""
    return inputs[0]


@dataclasses.dataclass(frozen=True)
class Rule:
    """All there is to say about an operation.

    Args:
        evaluate: what it does to moments, in PyTorch; None where they are given.
        lower: writes it for the CPU kernels, or raises `NoKernel`; None where they do not know it.
        describe: what reports say of it, from what they say of its inputs.
        trace: PyTorch's functions that become such a node, by their bare names, each with what makes it: a value, or
            one for each result. A value without a node has the reason why there is no prior.
        join: what it does to messages where learned transitions stand for all that lies between two layers.
    """

    evaluate: Evaluate | None
    lower: Lower | None = None
    describe: Describe = called
    trace: Mapping[str, Trace] = dataclasses.field(default_factory=dict)
    join: Evaluate = first
