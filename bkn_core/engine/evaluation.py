"""Measuring a model on labelled images, one image at a time in the books, so that runs can be compared in pairs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bkn_core.data.batches import epoch_order, normalize
from bkn_core.data.preprocess import Preprocess
from bkn_core.data.splits import ImageSet, LazyImageSet, prefetch
from bkn_core.engine.files import write_with
from bkn_core.population import Part, mixed_statistics, statistics

Predict = Callable[[Tensor], Tensor]
MIXTURES: dict[str, tuple[Part, Part]] = {
    "population_mean_group_variance": ("population", "group"),
    "group_mean_population_variance": ("group", "population"),
    "group": ("group", "group"),
}
"""Where mean and variance come from in the kinds of statistics that take one or both from groups of training's size."""


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

    def summary(self) -> dict[str, Any]:
        """Return the numbers, without the per-image records."""
        return {
            "top1": self.top1,
            "loss": self.loss,
            **{f"top{k}": v for k, v in self.topk.items()},
            "images": self.images,
        }


def measure(
    predict: Predict,
    images: ImageSet | LazyImageSet,
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


def measure_model(
    model: nn.Module,
    images: ImageSet | LazyImageSet,
    preprocess: Preprocess,
    *,
    kind: str,
    device: torch.device,
    batch_size: int = 250,
    topk: Sequence[int] = (1, 5),
    channels_last: bool = True,
    stop: Callable[[], None] = lambda: None,
    statistics_batch_size: int = 1,
) -> Metrics:
    """Measure a model in evaluation mode by one kind of statistics.

    Args:
        kind: "population", "batch" (each image's own) or one of `MIXTURES`, whose groups hold `statistics_batch_size`
            images each, drawn as an epoch draws them: in their own order those of one class lie side by side.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def predict(batch: Tensor) -> Tensor:
        stop()
        logits: Tensor = model(normalize(batch.to(device), preprocess, memory_format=layout))
        return logits

    order = None
    if kind in MIXTURES:
        used = mixed_statistics(model, *MIXTURES[kind], statistics_batch_size)
        order = epoch_order(len(images), 0, 0)
        batch_size += -batch_size % statistics_batch_size
    else:
        used = statistics(model, kind, 1)  # type: ignore[arg-type]
    with _evaluating(model), used, torch.inference_mode():
        return measure(predict, images, batch_size=batch_size, topk=topk, order=order)


def modes(stats: str) -> tuple[str, ...]:
    """Return the kinds of statistics that "population", "batch", "both" or "mixtures" asks for."""
    return {"both": ("population", "batch"), "mixtures": ("population", *MIXTURES)}.get(stats, (stats,))


def save_predictions(path: Path, images: ImageSet | LazyImageSet, metrics: dict[str, Metrics]) -> None:
    """Write label, prediction and loss of every image, by kind of statistics, and its file where it is one.

    Raises:
        OutputError: the file could not be written.
    """
    arrays: dict[str, Any] = {"labels": images.labels.numpy()}
    if images.names:
        arrays["names"] = np.array(images.names)
    for kind, measured in metrics.items():
        arrays[f"{kind}_predictions"] = measured.predictions.numpy()
        arrays[f"{kind}_losses"] = measured.losses.numpy()
    write_with(path, lambda file: np.savez_compressed(file, **arrays))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
