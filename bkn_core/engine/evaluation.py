"""Measuring a model on its images by the moving statistics, each image's own, or mixtures of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bkn_core.data.batches import epoch_order, normalize
from bkn_core.data.preprocess import Preprocess
from bkn_core.data.splits import Images
from bkn_core.engine.files import write_with
from bkn_core.engine.tasks.task import Measured, Task
from bkn_core.population import Part, mixed_statistics, statistics

MIXTURES: dict[str, tuple[Part, Part]] = {
    "population_mean_group_variance": ("population", "group"),
    "group_mean_population_variance": ("group", "population"),
    "group": ("group", "group"),
}
"""Where mean and variance come from in the kinds of statistics that take one or both from groups of training's size."""


def measure_model(
    model: nn.Module,
    images: Images,
    preprocess: Preprocess,
    *,
    task: Task,
    kind: str,
    device: torch.device,
    batch_size: int = 250,
    topk: Sequence[int] = (1, 5),
    channels_last: bool = True,
    stop: Callable[[], None] = lambda: None,
    statistics_batch_size: int = 1,
) -> Measured:
    """Measure a model in evaluation mode by one kind of statistics.

    Args:
        task: what it has learned.
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
        return task.measure(predict, images, batch_size=batch_size, topk=topk, order=order)


def modes(stats: str) -> tuple[str, ...]:
    """Return the kinds of statistics that "population", "batch", "both" or "mixtures" asks for."""
    return {"both": ("population", "batch"), "mixtures": ("population", *MIXTURES)}.get(stats, (stats,))


def save_predictions(path: Path, images: Images, metrics: Mapping[str, Measured]) -> None:
    """Write label, prediction and loss of every image, by kind of statistics, and its file where it is one.

    Raises:
        OutputError: the file could not be written.
    """
    arrays: dict[str, Any] = {"labels": images.labels.numpy()}
    if images.names:
        arrays["names"] = np.array(images.names)
    for kind, measured in metrics.items():
        arrays |= {f"{kind}_{name}": array for name, array in measured.records().items()}
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
