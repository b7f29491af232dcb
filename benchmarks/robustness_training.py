"""One training of robustness.py: a plain loop, then figures by population statistics and by each image by itself."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
from robustness_data import Sources, classes, is_segmentation, load
from robustness_grid import Settings
from robustness_networks import build
from torch import Tensor, nn
from torch.nn import functional as F

import bkn_core as bkn

PRIOR_IMAGES = 256  # for the prior of the first layer
WARMUP = 0.2  # the part of training in which the learning rate rises
GROWN = 3.0  # times its first value a loss has diverged

Images = tuple[Tensor, Tensor]


def train(settings: Settings, sources: Sources) -> dict[str, Any]:
    """Train and score one network.

    Returns:
        `loss` (mean of the last tenth), `population` and, for "bkn", `single` (accuracy or mean intersection over union
        in percent), `diverged`, `seconds` of training. A loss that is not finite ends the run without figures.
    """
    torch.manual_seed(settings.seed)
    images, labels = load(settings.data, "train", sources)
    model = converted(settings, images)
    started = time.perf_counter()
    losses = fit(model, settings, images, labels)
    seconds = time.perf_counter() - started
    loss, diverged = judge(losses)
    result = {"loss": loss, "population": None, "single": None, "diverged": diverged, "seconds": seconds}
    if loss is not None:
        scored = load(settings.data, settings.part, sources)
        result["population"] = score(model, scored, settings)
        if settings.norm == "bkn":
            with bkn.statistics(model, "batch", 1):
                result["single"] = score(model, scored, settings)
    return result


def converted(settings: Settings, images: Tensor) -> nn.Module:
    """Build the network of a training, with its norm layers; of one seed, the weights are the same for all."""
    network = build(settings.network, classes=classes(settings.data), channels=images.shape[1])
    prior = images[:PRIOR_IMAGES] if settings.norm == "bkn" else None
    return bkn.convert(
        network,
        images[:2],
        kind=settings.norm,  # type: ignore[arg-type]
        statistics_batch_size=settings.s,
        input_prior=prior,
    )


def fit(model: nn.Module, settings: Settings, images: Tensor, labels: Tensor) -> list[float]:
    """Train in place and return the loss of each step, up to the first that is not finite."""
    optimizer, losses = build_optimizer(model, settings), []
    if settings.weights == "centred":
        bkn.keep_weights_centred_(model, optimizer, images[:2])
    model.train()
    for step, chosen in enumerate(_batches(len(images), settings)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings.rate, step / settings.steps)
        if settings.norm == "bkn":
            bkn.anneal_gain_(model, step / settings.steps)
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Build the optimizer as most loops do, with all parameters alike."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=settings.rate)
    return torch.optim.SGD(model.parameters(), lr=settings.rate, momentum=0.9, nesterov=True, weight_decay=5e-4)


def learning_rate(highest: float, progress: float) -> float:
    """Return the rate after a part of training: by half a cosine up from a 25th, by another down to 0."""
    if progress < WARMUP:
        return highest * (1 - 24 / 25 * (1 + math.cos(math.pi * progress / WARMUP)) / 2)
    return highest * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))) / 2


def _batches(count: int, settings: Settings) -> Iterator[Tensor]:
    """Yield the images of each step: every one once before any again, and never a smaller batch."""
    generator = torch.Generator().manual_seed(settings.seed)
    left, order = settings.steps, torch.empty(0, dtype=torch.long)
    while left:
        if len(order) < settings.g:
            order = torch.cat((order, torch.randperm(count, generator=generator)))
        yield order[: settings.g]
        order, left = order[settings.g :], left - 1


def judge(losses: list[float]) -> tuple[float | None, bool]:
    """Return the mean loss of the last tenth, None where it is not finite, and whether training diverged.

    The first loss is the mean of the first hundredth.
    """
    if not math.isfinite(losses[-1]):
        return None, True
    last = fmean(losses[-max(1, len(losses) // 10) :])
    return last, last > GROWN * fmean(losses[: max(1, len(losses) // 100)])


@torch.no_grad()
def score(model: nn.Module, images: Images, settings: Settings) -> float:
    """Return accuracy, or mean intersection over union of the classes of a segmentation, in percent."""
    model.eval()
    count = classes(settings.data)
    table = torch.zeros(count * count)
    size = 50 if is_segmentation(settings.data) else 250
    for part, labels in zip(images[0].split(size), images[1].split(size), strict=True):
        pairs = labels * count + model(part).argmax(1)
        table += torch.bincount(pairs.flatten(), minlength=count * count)
    table = table.view(count, count)
    if is_segmentation(settings.data):
        return 100 * (table.diag() / (table.sum(0) + table.sum(1) - table.diag()).clamp(min=1)).mean().item()
    return 100 * (table.diag().sum() / table.sum()).item()
