"""One label a pixel: loss over pixels, and IoU and Dice of each class from counts that can be summed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bkn_core.data.mask_sets import IGNORED, OUTSIDE, MaskSet
from bkn_core.data.mask_splits import load_masks, load_test_masks
from bkn_core.data.preprocess import Preprocess
from bkn_core.data.splits import DataSplits, Images
from bkn_core.engine.tasks.pixels import SegmentationObjective, pixel_losses
from bkn_core.engine.tasks.task import Objective, Predict
from bkn_core.recipe import DataConfig, Recipe

_SHOWN = 6


@dataclasses.dataclass(frozen=True)
class PixelMetrics:
    """What was measured with one kind of statistics.

    IoU_c = n_cc / (Σ_j n_cj + Σ_j n_jc - n_cc) and Dice_c = 2 n_cc / (Σ_j n_cj + Σ_j n_jc), where n_cj counts the
    pixels of class c that were taken for class j over all images.

    Args:
        counts: n, int64 (classes, classes).
        loss: mean over images of their mean cross entropy.
        losses: of each image, (images,).
        images: how many.
        classes: their names.
        shown: image, mask and prediction of the first few images.
    """

    counts: Tensor = dataclasses.field(repr=False)
    loss: float
    losses: Tensor = dataclasses.field(repr=False)
    images: int
    classes: tuple[str, ...]
    shown: tuple[tuple[Tensor, Tensor, Tensor], ...] = dataclasses.field(default=(), repr=False)

    @property
    def iou(self) -> dict[str, float | None]:
        """IoU of each class, None where neither mask nor prediction has it."""
        return self._ratios(self.counts.diag(), self._either() - self.counts.diag())

    @property
    def dice(self) -> dict[str, float | None]:
        """Dice of each class, None where neither mask nor prediction has it."""
        return self._ratios(2 * self.counts.diag(), self._either())

    @property
    def figure(self) -> float:
        """Mean IoU of the classes that occur, which decides."""
        known = [value for value in self.iou.values() if value is not None]
        return sum(known) / max(len(known), 1)

    @property
    def pixel_accuracy(self) -> float:
        """Share of the pixels that are right."""
        return int(self.counts.diag().sum()) / max(int(self.counts.sum()), 1)

    @property
    def unit(self) -> str:
        """Pixels are counted."""
        return "pixels"

    @property
    def shares(self) -> dict[str, float]:
        """Mean IoU, mean Dice and pixel accuracy by their names."""
        dice = [value for value in self.dice.values() if value is not None]
        return {
            "mean IoU": self.figure,
            "mean Dice": sum(dice) / max(len(dice), 1),
            "pixel accuracy": self.pixel_accuracy,
        }

    def summary(self) -> dict[str, Any]:
        """Return the numbers, without the per-image records."""
        return {
            "mean_iou": self.figure,
            "loss": self.loss,
            "pixel_accuracy": self.pixel_accuracy,
            "iou": self.iou,
            "dice": self.dice,
            "images": self.images,
        }

    def confusion(self, images: Images) -> tuple[Tensor, Tensor]:
        """Return the counts of pixels by class and predicted class, and by class."""
        return self.counts, self.counts.sum(1)

    def records(self) -> dict[str, Any]:
        """Return each image's loss."""
        return {"losses": self.losses.numpy()}

    def _either(self) -> Tensor:
        return self.counts.sum(0) + self.counts.sum(1)

    def _ratios(self, above: Tensor, below: Tensor) -> dict[str, float | None]:
        pairs = zip(above.tolist(), below.tolist(), strict=True)
        return dict(zip(self.classes, (a / b if b else None for a, b in pairs), strict=True))


class Segmentation:
    """One label a pixel, judged by mean IoU."""

    figure: ClassVar[str] = "mean_iou"
    word: ClassVar[str] = "mean IoU"

    def load(self, recipe: Recipe, color: Any) -> DataSplits:
        """Load images with masks, see `load_masks`."""
        data = recipe.data
        return load_masks(
            data.name,
            root=data.root,
            image_size=data.image_size,
            train_images=data.train_images,
            test_images=data.test_images,
            validation=data.validation,
            color=color,
        )

    def load_test(
        self, data: DataConfig, preprocess: Preprocess, classes: Sequence[str]
    ) -> tuple[Images, tuple[str, ...]]:
        """Load the test images alone, see `load_test_masks`."""
        test = load_test_masks(
            data.name,
            root=data.root,
            preprocess=preprocess,
            classes=tuple(classes),
            test_images=data.test_images,
        )
        return test, ()

    def objective(self, recipe: Recipe, splits: DataSplits, images: int, device: torch.device) -> Objective:
        """Return the loss over pixels that the recipe asks for."""
        return SegmentationObjective(recipe, splits, device)

    def output(self, example: Tensor, classes: int) -> tuple[tuple[int, ...], str, str]:
        """Return the shape of logits: one for each class at each pixel."""
        height, width = example.shape[2:]
        words = f"{classes} logits for each of {height} x {width} pixels"
        return (len(example), classes, height, width), words, "Choose a network for segmentation, such as unet."

    def measure(
        self, predict: Predict, images: Images, *, batch_size: int, topk: Sequence[int], order: Tensor | None = None
    ) -> PixelMetrics:
        """Measure whole images, together where neighbours are of one size and no order is given."""
        assert isinstance(images, MaskSet)
        parts = [*images.alike(batch_size)] if order is None else [*torch.split(order, batch_size)]
        classes = len(images.classes)
        counts, losses = torch.zeros(classes, classes, dtype=torch.int64), torch.zeros(len(images))
        shown: list[tuple[Tensor, Tensor, Tensor]] = []
        for part in parts:
            pixels, masks = images.batch(part)
            logits = predict(pixels).float().cpu()
            found = logits.argmax(1)
            shown += zip(pixels, masks, found, strict=True) if len(shown) < _SHOWN else ()
            masks = masks.where(masks != OUTSIDE, IGNORED)
            losses[part] = pixel_losses(logits, masks, None)
            known = masks != IGNORED
            pairs = masks[known] * classes + found[known]
            counts += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
        return PixelMetrics(
            counts, losses.double().mean().item(), losses, len(images), images.classes, tuple(shown[:_SHOWN])
        )
