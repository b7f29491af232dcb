"""One label an image, measured one image at a time in the books, so that runs can be compared in pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bkn_core.data.preprocess import Preprocess
from bkn_core.data.splits import DataSplits, Images, load_data, load_test_images, prefetch
from bkn_core.engine.objective import ClassificationObjective
from bkn_core.engine.tasks.task import Objective, Predict
from bkn_core.errors import RecipeError
from bkn_core.recipe import DataConfig, Recipe


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What was measured with one kind of statistics.

    Args:
        top1: fraction of images whose label has the highest logit.
        topk: the fraction whose label is among the k highest, by k.
        loss: mean cross entropy.
        images: how many.
        correct: which images' label has the highest logit, (images,).
        losses: cross entropy of each image, (images,).
        predictions: the class with the highest logit, (images,).
    """

    top1: float
    topk: dict[int, float]
    loss: float
    images: int
    correct: Tensor = dataclasses.field(repr=False)
    losses: Tensor = dataclasses.field(repr=False)
    predictions: Tensor = dataclasses.field(repr=False)

    @property
    def figure(self) -> float:
        """Top-1, which decides."""
        return self.top1

    @property
    def unit(self) -> str:
        """Images are counted."""
        return "images"

    @property
    def shown(self) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
        """Nothing: a label needs no picture."""
        return ()

    @property
    def shares(self) -> dict[str, float]:
        """Top-1 and top-k by their names."""
        return {"top-1": self.top1, **{f"top-{k}": share for k, share in self.topk.items()}}

    def confusion(self, images: Images) -> tuple[Tensor, Tensor]:
        """Count images by class and predicted class, those without a finite loss in no column, and by class."""
        classes, known = len(images.classes), self.losses.isfinite()
        pairs = images.labels[known] * classes + self.predictions[known]
        counts = torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)
        return counts, images.labels.bincount(minlength=classes)

    def records(self) -> dict[str, Any]:
        """Return each image's prediction and loss."""
        return {"predictions": self.predictions.numpy(), "losses": self.losses.numpy()}

    def summary(self) -> dict[str, Any]:
        """Return the numbers, without the per-image records."""
        return {
            "top1": self.top1,
            "loss": self.loss,
            **{f"top{k}": v for k, v in self.topk.items()},
            "images": self.images,
        }


class Classification:
    """One label an image, judged by top-1."""

    figure: ClassVar[str] = "top1"
    word: ClassVar[str] = "top-1"

    def load(self, recipe: Recipe, color: Any) -> DataSplits:
        """Load labelled images, see `load_data`."""
        data = recipe.data
        return load_data(
            data.name,
            root=data.root,
            image_size=data.image_size,
            resize=data.resize,
            train_images=data.train_images,
            test_images=data.test_images,
            validation=data.validation,
            color=color,
            download=data.download,
            workers=recipe.train.workers,
            together=max(recipe.batch.per_device, recipe.eval.batch_size),
        )

    def load_test(
        self, data: DataConfig, preprocess: Preprocess, classes: Sequence[str]
    ) -> tuple[Images, tuple[str, ...]]:
        """Load the test images alone, see `load_test_images`."""
        return load_test_images(
            data.name, root=data.root, preprocess=preprocess, test_images=data.test_images, download=data.download
        )

    def objective(self, recipe: Recipe, splits: DataSplits, images: int, device: torch.device) -> Objective:
        """Return the cross entropy of labels."""
        given = {"data.scale": recipe.data.scale, "data.jitter": recipe.data.jitter, "train.loss": recipe.train.loss}
        for key, value in given.items():
            if value not in (None, 0.0, "cross_entropy"):
                raise RecipeError(
                    f"{key} is {value}, which only masks know, but task is classification", "Leave it out."
                )
        return ClassificationObjective(recipe, splits, images, device)

    def output(self, example: Tensor, classes: int) -> tuple[tuple[int, ...], str, str]:
        """Return the shape of logits: one for each class."""
        words = f"one logit for each of {classes} classes", "Choose a classifier, without auxiliary heads."
        return (len(example), classes), *words

    def measure(
        self, predict: Predict, images: Images, *, batch_size: int, topk: Sequence[int], order: Tensor | None = None
    ) -> Metrics:
        """Measure top-1, top-k and cross entropy."""
        return measure(predict, images, batch_size=batch_size, topk=topk, order=order)


def measure(
    predict: Predict,
    images: Images,
    *,
    batch_size: int,
    topk: Sequence[int] = (1, 5),
    order: Tensor | None = None,
) -> Metrics:
    """Measure a classifier on labelled images.

    Args:
        predict: from uint8 images (N, C, H, W) to logits (N, classes).
        images: what it is measured on.
        batch_size: images per call.
        topk: the k of the fractions; those above the number of classes are left out.
        order: in which the images are taken; default their own, in which records are given anyway.
    """
    order = torch.arange(len(images)) if order is None else order
    parts, back = torch.split(order, batch_size), order.argsort()
    ranks, losses, predictions = [], [], []
    for batch, labels in prefetch(images, parts):
        logits = predict(batch).float().cpu()
        truth = logits.gather(1, labels[:, None])
        # NaN compares false with everything: counted as a mistake, not as a hit.
        ranks.append((~(logits < truth)).sum(1) - 1)
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
        predictions.append(logits.argmax(1))
        classes = logits.shape[1]
    rank, loss, prediction = (torch.cat(rows)[back] for rows in (ranks, losses, predictions))
    correct = prediction == images.labels
    correct &= loss.isfinite()
    fractions = {k: (rank < k).double().mean().item() for k in topk if 1 < k < classes}
    return Metrics(
        correct.double().mean().item(), fractions, loss.double().mean().item(), len(images), correct, loss, prediction
    )
