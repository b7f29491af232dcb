"""One forward of a converted model on one thread: where its layers get their priors, and what they have seen.

Threads have forwards of their own, so that those that run at the same time do not mix. What activation checkpointing
runs again in the backward pass finds the forward that it repeats. A reentrant checkpoint backpropagates through each
part that it runs again on its own, so each layer there gets a prediction of its own: parts of a shared one would be
backpropagated twice.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bkn_core.errors import ConversionError
from bkn_core.filter.kalman import Gaussian
from bkn_core.filter.state import Observation

OUTSIDE = (
    "a {} was called outside the forward of its converted model and has no prior: it normalizes by its batch alone"
)


class Forward:
    """One forward of one thread: refined priors and gains of its layers, by their names, and what these have seen.

    Args:
        priors, gains: that depend on parameters only.
        again: computes those of one layer on their own, sharing nothing with other layers.
    """

    reads_posteriors = False

    def __init__(
        self,
        priors: Mapping[str, Gaussian],
        gains: Mapping[str, Tensor],
        again: Callable[[str], Forward] | None = None,
    ) -> None:
        self.priors, self.gains, self.again = priors, gains, again
        self.observations: list[Observation] = []  # they move what the layers remember when it ends
        self.is_open = True

    def prior(self, name: str) -> Gaussian | None:
        """Return the refined prior of a layer."""
        return self.priors.get(name)

    def gain(self, name: str) -> Tensor | None:
        """Return the gain of a layer, None where the layer is to compute it."""
        return self.gains.get(name)

    def publish(self, name: str, posterior: Gaussian) -> None:
        """Take the posterior of a layer for those that follow, where one reads it."""

    def unshared(self, name: str) -> Forward:
        """Return the forward in which a layer runs again, with a prior and a gain that it shares with no other.

        Raises:
            ConversionError: where they cannot be computed again.
        """
        if self.again is None:
            raise ConversionError(
                "reentrant activation checkpointing needs message='normalized' and a model that is not compiled",
                "Use checkpoint(..., use_reentrant=False).",
            )
        return self.again(name)


@dataclasses.dataclass
class LayerContext:
    """The newest forward on one thread of the model that holds a layer.

    Args:
        forward: None before the first.
        name: of the layer in the model.
        is_without_gradient: whether the layer ran under `torch.no_grad`.
    """

    forward: Forward | None = None
    name: str = ""
    is_without_gradient: bool = False

    def current(self, newest: LayerContext | None) -> tuple[Forward | None, str]:
        """Return the forward that the layer is called in and its name there, None outside that of its converted model.

        Args:
            newest: the newest context of all threads, for a backward pass that runs on a thread of its own.
        """
        if self.forward is not None and self.forward.is_open:
            if not torch.compiler.is_compiling():  # which may not change it inside a checkpoint
                self.is_without_gradient = not torch.is_grad_enabled()
            return self.forward, self.name
        context = newest if self.forward is None else self
        if context is None or context.forward is None or not is_recomputation():
            return None, ""
        is_reentrant = context.is_without_gradient and torch.is_grad_enabled()
        return context.forward.unshared(context.name) if is_reentrant else context.forward, context.name


class ContextSlots(threading.local):
    """One context for each thread, in `own`: the compiler would lose what is written to a thread's object itself."""

    def __init__(self) -> None:  # runs once in every thread
        self.own = LayerContext()

    def __reduce__(self) -> tuple[type[ContextSlots], tuple[()]]:
        """Copies are empty: a context belongs to the graph of its forward."""
        return ContextSlots, ()


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass, as activation checkpointing makes it."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)
