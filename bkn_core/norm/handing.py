"""How a converted model hands its layers what they cannot know, and takes what they have seen, while it runs."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from bkn_core.norm.kalman import Gaussian
from bkn_core.norm.together import Seen


class Relay(Protocol):
    """A layer's access to the forward of the model that holds it."""

    reads_posteriors: bool
    ledger: list[Seen]

    def prior(self) -> Gaussian | None:
        """Return the refined prior of the layer."""

    def gain(self) -> Tensor | None:
        """Return the layer's gain, None where the layer is to compute it."""

    def publish(self, posterior: Gaussian) -> None:
        """Take the posterior of the layer for those that follow."""

    def record(self, seen: Seen) -> None:
        """Take what moves the layer's moving statistics when the forward ends."""


@dataclasses.dataclass
class Handed:
    """A layer's prior and gain where both depend on parameters only."""

    ledger: list[Seen]
    value: Gaussian | None
    weight: Tensor
    reads_posteriors = False

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


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass, as activation checkpointing makes it."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)
