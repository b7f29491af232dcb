"""What a task says of itself, so that nothing else of the engine asks which one it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from bkn_core.data.preprocess import Preprocess
from bkn_core.data.splits import DataSplits, Images
from bkn_core.recipe import DataConfig, Recipe

Predict = Callable[[Tensor], Tensor]


class Measured(Protocol):
    """What was measured with one kind of statistics."""

    @property
    def figure(self) -> float:
        """The fraction that decides which epoch is best: higher is better."""

    @property
    def unit(self) -> str:
        """What a confusion matrix counts."""

    @property
    def shares(self) -> Mapping[str, float]:
        """The fractions that a table shows, by the words of its columns; the one that decides comes first."""

    @property
    def loss(self) -> float:
        """Mean loss."""

    @property
    def images(self) -> int:
        """How many were measured."""

    @property
    def losses(self) -> Tensor:
        """Loss of each image, (images,)."""

    @property
    def shown(self) -> Sequence[tuple[Tensor, Tensor, Tensor]]:
        """Image, mask and prediction of a few images, none where a table says all."""

    def summary(self) -> dict[str, Any]:
        """Return the numbers, without the per-image records."""

    def confusion(self, images: Images) -> tuple[Tensor, Tensor]:
        """Count what was measured by class and predicted class, (classes, classes), and by class, (classes,)."""

    def records(self) -> dict[str, Any]:
        """Return what is kept of each image, arrays by name."""


class Objective(Protocol):
    """From the images of a pass to the model's input, and from its logits to the loss."""

    def inputs(
        self, images: Tensor, labels: Tensor, generator: torch.Generator, layout: torch.memory_format
    ) -> tuple[Tensor, Tensor]:
        """Return the model's input and what it is to say."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, summed over the images."""


class Task(Protocol):
    """A kind of task; `figure` names the number that decides, `word` is what people call it."""

    figure: ClassVar[str]
    word: ClassVar[str]

    def load(self, recipe: Recipe, color: Any) -> DataSplits:
        """Load the recipe's data in a colour, or its own where that is None."""

    def load_test(
        self, data: DataConfig, preprocess: Preprocess, classes: Sequence[str]
    ) -> tuple[Images, tuple[str, ...]]:
        """Load the test images alone as a trained model wants them, and notes on them."""

    def objective(self, recipe: Recipe, splits: DataSplits, images: int, device: torch.device) -> Objective:
        """Return what a training with so many images a pass minimizes."""

    def output(self, example: Tensor, classes: int) -> tuple[tuple[int, ...], str, str]:
        """Return the shape that a network makes of images, what that is in words, and which networks do so."""

    def measure(
        self, predict: Predict, images: Images, *, batch_size: int, topk: Sequence[int], order: Tensor | None = None
    ) -> Measured:
        """Measure a prediction, from uint8 images to logits, on images in the given order."""
