"""Which of the priors that a wiring describes a conversion can compute."""

from __future__ import annotations

from torch import nn

from bkn_core.wiring.discover import REPEATED
from bkn_core.wiring.program import Wiring


def supported(wiring: Wiring, model: nn.Module, chosen: set[str], *, is_static: bool, has_input_prior: bool) -> Wiring:
    """Keep the priors of the chosen layers, and of those only what can be computed.

    Args:
        wiring: of the whole model.
        model: whose wiring it is.
        chosen: the layers that are converted.
        is_static: whether messages depend on parameters only, not on the posteriors of a forward.
        has_input_prior: whether the moments of the network input are given.
    """
    mute = set() if is_static else _without_posterior(wiring, model, chosen)
    priors, reasons = {}, {name: reason for name, reason in wiring.reasons.items() if name in chosen}
    for name, number in wiring.priors.items():
        needed = [wiring.lines[i] for i in sorted(wiring.needed([number]))]
        reads_input = any(line.operation in ("patches", "measured") for line in needed)
        reads_mute = next((line.name for line in needed if line.operation == "norm" and line.name in mute), None)
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
    return wiring.only(priors, reasons)


def _without_posterior(wiring: Wiring, model: nn.Module, chosen: set[str]) -> set[str]:
    """Return the layers of which a forward has no posterior, or several."""
    repeated = {name for name, reason in wiring.reasons.items() if reason == REPEATED and name in chosen}
    others = {line.name for line in wiring.lines if line.operation == "norm" and line.name not in chosen}
    return repeated | {name for name in others if model.get_submodule(name).running_mean is None}
