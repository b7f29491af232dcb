"""How a converted model hands its layers what they cannot know, and takes what they have seen, while it runs.

A forward gives every layer a relay. Each thread has its own, so that forwards that run at the same time do not mix.
What activation checkpointing runs again in the backward pass finds the relay of the forward that it repeats. A
reentrant checkpoint backpropagates through each part that it runs again on its own, so each layer there gets a
prediction of its own: parts of a shared one would be backpropagated twice.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from bkn_core.errors import ConversionError
from bkn_core.norm.kalman import Gaussian
from bkn_core.norm.tracking import Seen


class Relay(Protocol):
    """A layer's access to the forward of the model that holds it."""

    reads_posteriors: bool
    is_without_gradient: bool  # whether the layer ran under torch.no_grad
    ledger: list[Seen]

    def prior(self) -> Gaussian | None:
        """Return the refined prior of the layer."""

    def gain(self) -> Tensor | None:
        """Return the layer's gain, None where the layer is to compute it."""

    def publish(self, posterior: Gaussian) -> None:
        """Take the posterior of the layer for those that follow."""

    def record(self, seen: Seen) -> None:
        """Take what moves the layer's moving statistics when the forward ends."""

    def alone(self) -> Relay:
        """Return a relay whose prior and gain share nothing with those of other layers.

        Raises:
            ConversionError: where there is none.
        """


@dataclasses.dataclass
class Handed:
    """A layer's prior and gain where both depend on parameters only.

    Args:
        ledger: of this forward.
        value: the refined prior.
        weight: the gain.
        renew: how to compute both once more, for a reentrant checkpoint.
    """

    ledger: list[Seen]
    value: Gaussian | None
    weight: Tensor
    renew: Callable[[], Handed] | None = None
    reads_posteriors = False
    is_without_gradient: bool = False

    def prior(self) -> Gaussian | None:
        """Return the refined prior."""
        return self.value

    def gain(self) -> Tensor:
        """Return q."""
        return self.weight

    def publish(self, posterior: Gaussian) -> None:
        """Nobody reads it."""

    def record(self, seen: Seen) -> None:
        """Keep it for the end of the forward."""
        self.ledger.append(seen)

    def alone(self) -> Handed:
        """Compute prior and gain once more, from the parameters."""
        if self.renew is None:
            raise not_again()
        return self.renew()


class Mailbox:
    """The relay that a layer got on one thread, and whether its forward is still running."""

    def __init__(self) -> None:
        self.relay: Relay | None = None
        self.is_open = False

    def put(self, relay: Relay) -> None:
        """Begin a forward."""
        self.relay, self.is_open = relay, True

    def take(self, newest: Relay | None) -> Relay | None:
        """Return the relay for the call that the layer is in, None outside the forward of its converted model.

        Args:
            newest: the newest relay of all threads, for a backward pass that runs on a thread of its own.
        """
        if self.is_open and self.relay is not None:
            if not torch.compiler.is_compiling():  # which may not change it inside a checkpoint
                self.relay.is_without_gradient = not torch.is_grad_enabled()
            return self.relay
        relay = self.relay or newest
        if relay is None or not is_recomputation():
            return None
        return relay.alone() if relay.is_without_gradient and torch.is_grad_enabled() else relay


class Mailboxes(threading.local):
    """One mailbox for each thread, in `own`: the compiler would lose what is written to a thread's object itself."""

    def __init__(self) -> None:  # runs once in every thread
        self.own = Mailbox()

    def __reduce__(self) -> tuple[type[Mailboxes], tuple[()]]:
        """Copies are empty: a relay belongs to the graph of its forward."""
        return Mailboxes, ()


def not_again() -> ConversionError:
    """Return what to say of a forward that a reentrant checkpoint cannot compute again."""
    return ConversionError(
        "reentrant activation checkpointing needs message='normalized' and a model that is not compiled",
        "Use checkpoint(..., use_reentrant=False).",
    )


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass, as activation checkpointing makes it."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)
