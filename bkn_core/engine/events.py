"""What a run tells its caller while it goes on: plain records, handed to one `on_event` callable."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Started:
    """A run begins or goes on."""

    run: Path
    step: int
    steps: int
    epochs: int
    device: str
    parameters: int
    train_images: int
    test_images: int
    validation_images: int
    priors: int
    norms: int


@dataclasses.dataclass(frozen=True)
class Stepped:
    """An optimizer step is done; `loss` is the mean since the last one that was logged, or None in between."""

    step: int
    epoch: int
    images: int
    loss: float | None
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class EpochEnded:
    """An epoch is done and measured on "test" or "validation" images.

    `figures` are those that decide, called `word`, and `loss` the losses, by kind of statistics.
    """

    epoch: int
    epochs: int
    step: int
    train_loss: float
    word: str
    figures: dict[str, float]
    loss: dict[str, float]
    images_per_second: float
    images: Literal["test", "validation"]


@dataclasses.dataclass(frozen=True)
class Notice:
    """Something the user should know."""

    text: str


Event = Started | Stepped | EpochEnded | Notice
