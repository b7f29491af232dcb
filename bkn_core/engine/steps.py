"""One step of a training as plain data: what goes in, and what came of it."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Pass:
    """One forward pass: its place in the epoch, its images and labels on the CPU."""

    index: int
    images: Tensor
    labels: Tensor


@dataclasses.dataclass(frozen=True)
class Step:
    """What an optimizer step did: mean loss (on the device), images, learning rate; why it was skipped, if it was."""

    loss: Tensor
    images: int
    learning_rate: float
    skipped: str = ""
