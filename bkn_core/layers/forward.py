"""How a converted model hands its layers what they cannot know, and takes what they have seen, while it runs.

A forward gives every layer a context. Each thread has its own, so that forwards that run at the same time do not mix.
What activation checkpointing runs again in the backward pass finds the context of the forward that it repeats. A
reentrant checkpoint backpropagates through each part that it runs again on its own, so each layer there gets a
prediction of its own: parts of a shared one would be backpropagated twice.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from bkn_core.errors import ConversionError
from bkn_core.filter.kalman import Gaussian
from bkn_core.filter.state import Observation

OUTSIDE = (
    "a {} was called outside the forward of its converted model and has no prior: it normalizes by its batch alone"
)


@dataclasses.dataclass
class LayerContext:
    """A layer's access to the forward of the model that holds it; its prior and gain depend on parameters only.

    Args:
        observations: of this forward; they move what the layers remember when it ends.
        value: the refined prior.
        weight: the gain; None where the layer is to compute it.
        renew: how to compute both once more, sharing nothing with other layers, for a reentrant checkpoint.
    """

    observations: list[Observation]
    value: Gaussian | None = None
    weight: Tensor | None = None
    renew: Callable[[], LayerContext] | None = None
    reads_posteriors = False
    is_without_gradient: bool = False  # whether the layer ran under torch.no_grad

    def prior(self) -> Gaussian | None:
        """Return the refined prior."""
        return self.value

    def gain(self) -> Tensor | None:
        """Return q."""
        return self.weight

    def publish(self, posterior: Gaussian) -> None:
        """Take the posterior of the layer for those that follow, where one reads it."""

    def observe(self, seen: Observation) -> None:
        """Keep it for the end of the forward."""
        self.observations.append(seen)

    def unshared(self) -> LayerContext:
        """Return a context whose prior and gain share nothing with those of other layers.

        Raises:
            ConversionError: where they cannot be computed again.
        """
        if self.renew is None:
            raise ConversionError(
                "reentrant activation checkpointing needs message='normalized' and a model that is not compiled",
                "Use checkpoint(..., use_reentrant=False).",
            )
        return self.renew()


class ContextSlot:
    """The context that a layer got on one thread, and whether its forward is still running."""

    def __init__(self) -> None:
        self.context: LayerContext | None = None
        self.is_open = False

    def enter(self, context: LayerContext) -> None:
        """Begin a forward."""
        self.context, self.is_open = context, True

    def current(self, newest: LayerContext | None) -> LayerContext | None:
        """Return the context for the call that the layer is in, None outside the forward of its converted model.

        Args:
            newest: the newest context of all threads, for a backward pass that runs on a thread of its own.
        """
        if self.is_open and self.context is not None:
            if not torch.compiler.is_compiling():  # which may not change it inside a checkpoint
                self.context.is_without_gradient = not torch.is_grad_enabled()
            return self.context
        context = self.context or newest
        if context is None or not is_recomputation():
            return None
        return context.unshared() if context.is_without_gradient and torch.is_grad_enabled() else context


class ContextSlots(threading.local):
    """One slot for each thread, in `own`: the compiler would lose what is written to a thread's object itself."""

    def __init__(self) -> None:  # runs once in every thread
        self.own = ContextSlot()

    def __reduce__(self) -> tuple[type[ContextSlots], tuple[()]]:
        """Copies are empty: a context belongs to the graph of its forward."""
        return ContextSlots, ()


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass, as activation checkpointing makes it."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)
