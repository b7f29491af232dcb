"""All priors of a model: programs for the kernels in C or in Triton, and between them the nodes that PyTorch evaluates.

A node that the kernels do not know costs its own evaluation. What it reads comes from a program of the nodes before it,
what it gives enters the next program as a tensor, and autograd passes the gradients from one to the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from bkn_core.filter.autograd import is_eager
from bkn_core.filter.kalman import Gaussian
from bkn_core.graph.graph import Graph, Node
from bkn_core.graph.instructions import NoKernel, ProgramBuilder, Slot
from bkn_core.graph.kernel_program import KernelProgram
from bkn_core.graph.operations import evaluate, lower
from bkn_core.graph.triton_program import TritonProgram
from bkn_core.ops import backend, kernels


class _Stage(NamedTuple):
    """Nodes that PyTorch evaluates, none of which reads another, and the program of what they read."""

    program: KernelProgram
    numbers: list[int]


class LoweredGraph:
    """The programs of a graph and the nodes between them.

    Args:
        graph: which layers feed which.
        names: all layers, of which each gets its gain.
        model: gives the shapes.
        kind: of the programs.
    """

    def __init__(
        self, graph: Graph, names: Sequence[str], model: nn.Module, kind: type[KernelProgram] = KernelProgram
    ) -> None:
        self.kind = kind
        unknown = _unknown(graph, model)
        self.nodes = {i: graph.nodes[i] for i in unknown}
        known = tuple(_given(node, i) if i in unknown else node for i, node in enumerate(graph.nodes))
        graph = dataclasses.replace(graph, nodes=known)
        self.stages: list[_Stage] = []
        for numbers in _by_depth(self.nodes, known):
            read = {i: None for number in numbers for i in self.nodes[number].inputs if i not in unknown}
            program = kind(graph.only({str(i): i for i in read}, {}), (), model)
            self.stages.append(_Stage(program, numbers))
        self.last = kind(graph.only(graph.priors, {}), names, model)

    @property
    def is_whole(self) -> bool:
        """Whether the last program is all there is."""
        return not self.stages

    def predictions(self, model: nn.Module) -> tuple[dict[str, Gaussian], dict[str, Tensor]] | None:
        """Return all priors and gains by the names of their layers, None where the kernels cannot take the model's
        tensors.
        """
        messages: dict[int, Gaussian] = {}
        for program, numbers in self.stages:
            found = program.predictions(model, messages)
            if found is None:
                return None
            messages |= {int(name): message for name, message in found[0].items()}
            for number in numbers:
                node = self.nodes[number]
                messages[number] = evaluate(node, [messages[i] for i in node.inputs], model)
        return self.last.predictions(model, messages)


def _given(node: Node, number: int) -> Node:
    return Node("given", (), node.channels, name=number)


def kind_for(tensor: Tensor) -> type[KernelProgram] | None:
    """Return which programs can be run now where a tensor is, None where only PyTorch can."""
    if is_eager() and backend.takes_triton(tensor.device.type):
        return TritonProgram
    return KernelProgram if kernels.are_usable() else None


def _unknown(graph: Graph, model: nn.Module) -> list[int]:
    """Return the numbers of the nodes that the kernels do not know."""
    builder, unknown = ProgramBuilder(model, 0), []
    slots: list[Slot] = []
    for i, node in enumerate(graph.nodes):
        try:
            slots.append(lower(builder, node, [slots[j] for j in node.inputs]))
        except NoKernel:
            unknown.append(i)
            slots.append(builder.slot(node.channels))
    return unknown


def _by_depth(unknown: Mapping[int, Node], nodes: Sequence[Node]) -> list[list[int]]:
    """Group nodes by how many others of them lie before each."""
    depths: list[int] = []
    groups: list[list[int]] = []
    for i, node in enumerate(nodes):
        depth = max((depths[j] for j in unknown.get(i, node).inputs), default=0)
        depths.append(depth + (i in unknown))
        if i in unknown:
            groups += [[]] if depth == len(groups) else []
            groups[depth].append(i)
    return groups
