"""How a prior reaches a layer whose model calls it with one argument, and when it may be used."""

from __future__ import annotations

from typing import Protocol

import torch

from bkn_core.norm.kalman import Gaussian


class Relay(Protocol):
    """Where a layer asks for its prior and leaves its posterior when messages depend on the forward."""

    def prior(self) -> Gaussian | None:
        """Return the refined prior of the layer, from the posteriors that have arrived."""

    def publish(self, posterior: Gaussian) -> None:
        """Take the posterior of the layer for those that follow."""


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass, as activation checkpointing makes it."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)
