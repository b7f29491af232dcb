"""Which of the priors that a graph describes a conversion can compute."""

from __future__ import annotations

from torch import nn

from bkn_core.graph.graph import Graph
from bkn_core.graph.trace import REPEATED


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
