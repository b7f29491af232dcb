"""How a prior reaches a layer whose model calls it with one argument, and when it may be used.

A forward hands every layer a letter. Each thread has its own, so that forwards that run at the same time do not mix.
What activation checkpointing runs again in the backward pass finds the letter of the forward that it repeats.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Protocol

import torch

from bkn_core.errors import ConversionError
from bkn_core.norm.kalman import Gaussian


class Relay(Protocol):
    """Where a layer asks for its prior and leaves its posterior when messages depend on the forward."""

    def prior(self) -> Gaussian | None:
        """Return the refined prior of the layer, from the posteriors that have arrived."""

    def publish(self, posterior: Gaussian) -> None:
        """Take the posterior of the layer for those that follow."""


@dataclasses.dataclass
class Letter:
    """What one forward hands to one layer.

    Args:
        prior: where it depends on parameters only.
        relay: where it depends on this forward's posteriors.
        renew: computes the prior once more, from the parameters.
        is_without_gradient: whether the layer ran under `torch.no_grad`.
    """

    prior: Gaussian | None = None
    relay: Relay | None = None
    renew: Callable[[], Gaussian] | None = None
    is_without_gradient: bool = False

    def read(self) -> Gaussian | None:
        """Return the prior for the forward that the letter was written for."""
        if not torch.compiler.is_compiling():  # which may not change it inside a checkpoint
            self.is_without_gradient = not torch.is_grad_enabled()
        return self.prior if self.relay is None else self.relay.prior()

    def read_again(self) -> Gaussian | None:
        """Return the prior for a recomputation of that forward.

        A reentrant checkpoint backpropagates through each part that it runs again on its own, so each layer there needs
        a prediction of its own: parts of a shared one would be backpropagated twice.

        Raises:
            ConversionError: for what a reentrant checkpoint cannot recompute.
        """
        if not (self.is_without_gradient and torch.is_grad_enabled()):
            return self.prior if self.relay is None else self.relay.prior()
        if self.relay is not None or self.renew is None:
            raise ConversionError(
                "reentrant activation checkpointing needs message='normalized' and a model that is not compiled",
                "Use checkpoint(..., use_reentrant=False).",
            )
        return self.renew()


class Mailbox:
    """The newest letter that a layer got on one thread, and whether its forward is still running."""

    def __init__(self) -> None:
        self.letter: Letter | None = None
        self.is_open = False

    def prior(self, newest: Letter | None) -> Gaussian | None:
        """Return the prior for the call that the layer is in, None outside the forward of its converted model.

        Args:
            newest: the newest letter of all threads, for a backward pass that runs on a thread of its own.
        """
        if self.is_open and self.letter is not None:
            return self.letter.read()
        letter = self.letter or newest
        return letter.read_again() if letter is not None and is_recomputation() else None

    def publish(self, posterior: Gaussian) -> None:
        """Pass the posterior of a running forward on to whoever waits for it."""
        if self.is_open and self.letter is not None and self.letter.relay is not None:
            self.letter.relay.publish(posterior)


class Mailboxes(threading.local):
    """One mailbox for each thread, in `own`: the compiler would lose what is written to a thread's object itself."""

    def __init__(self) -> None:  # runs once in every thread
        self.own = Mailbox()

    def __reduce__(self) -> tuple[type[Mailboxes], tuple[()]]:
        """Copies are empty: a letter belongs to the graph of its forward."""
        return Mailboxes, ()


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass, as activation checkpointing makes it."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)
