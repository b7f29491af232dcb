"""Which statistics normalize at inference, and re-estimating the population's with fixed weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from bkn_core.errors import ConversionError
from bkn_core.filter.kalman import Gaussian, Groups, average_over_groups, normalize
from bkn_core.filter.state import FilterStatistics
from bkn_core.layers.batch_kalman import BatchKalmanNorm, Statistics

Part = Literal["population", "group"]


@contextlib.contextmanager
def statistics(model: nn.Module, kind: Statistics, statistics_batch_size: int | None = 1) -> Iterator[None]:
    """Let the Batch Kalman layers of a model normalize by one kind of statistics for a while.

    "batch" observes the images themselves, blended with the priors by the trained gain; at a statistics batch size of
    1 the result of an image does not depend on its neighbours. "population" uses the moving statistics.

    Args:
        model: a converted model.
        kind: "batch" or "population".
        statistics_batch_size: images per group in "batch"; None is the whole batch.

    Raises:
        ConversionError: for another kind.
    """
    if kind not in ("batch", "population"):
        raise ConversionError(f"statistics are {kind!r}", "Choose one of batch, population.")
    layers = [module for module in model.modules() if isinstance(module, BatchKalmanNorm)]
    before = [layer.statistics for layer in layers]
    try:
        for layer in layers:
            layer.statistics = (kind, statistics_batch_size)
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.statistics = old


@contextlib.contextmanager
def mixed_statistics(
    model: nn.Module, mean: Part, variance: Part, statistics_batch_size: int | None = None
) -> Iterator[None]:
    """Let the Batch Kalman layers of a model take the mean and the variance from different statistics for a while.

        y = γ (x - µ) / sqrt(v + ε) + β,   µ the moving mean or µ̂ of the group,   v the moving variance or v̂

    µ̂ and v̂ are what a group is normalized by in training: the posterior, without a prior the group's own moments.

    Args:
        model: a converted model.
        mean: "population" or "group".
        variance: likewise.
        statistics_batch_size: images per group; None is the whole batch.
    """
    kind: Statistics = "population" if mean == variance == "population" else "batch"
    with statistics(model, kind, statistics_batch_size), contextlib.ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, BatchKalmanNorm) and layer.running_mean is not None and mean != variance:
                stack.enter_context(_mixed(layer, mean, statistics_batch_size))
        yield


@contextlib.contextmanager
def _mixed(layer: BatchKalmanNorm, mean: Part, size: int | None) -> Iterator[None]:
    """Normalize again what a layer has normalized by its groups, with a mean or a variance that is the moving one."""
    seen: list[FilterStatistics] = []

    def again(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x, moving = inputs[0], (layer.running_mean, layer.running_var)
        assert moving[0] is not None and moving[1] is not None
        own = seen.pop()
        pair = (own.mean, moving[1]) if mean == "group" else (moving[0], own.variance)
        rows = (Groups.of(len(x), size).spread(values.expand_as(own.mean)) for values in pair)
        return normalize(x, Gaussian(*rows), layer.weight, layer.bias, layer.eps)

    layer.on_posterior = lambda found, *_: seen.append(found)
    handle = layer.register_forward_hook(again)
    try:
        yield
    finally:
        handle.remove()
        layer.on_posterior = None


@torch.no_grad()
def estimate_population(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace, in place, the moving statistics by the average posterior over batches, with fixed weights.

        m = mean(µ̂),   v = mean(diag Σ̂)

    What normalized in training is averaged: the posterior, not the raw moments. Groups have the size of training.

    Args:
        model: a converted model; its training flags are left as they were.
        batches: training images as the model sees them.

    Raises:
        ConversionError: without any image.
    """
    layers = [m for m in model.modules() if isinstance(m, BatchKalmanNorm) and m.running_mean is not None]
    sums = [_PosteriorSums(layer) for layer in layers]
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for layer in layers:
            layer.statistics = ("batch", layer.statistics_batch_size)
        images = 0
        for batch in batches:
            images += len(batch)
            model(batch)
    finally:
        for total in sums:
            total.close()
        for module, flag in training:
            module.training = flag
    if images == 0:
        raise ConversionError("estimate_population was given no image", "Give batches of training images.")
    for total in sums:
        total.write()


class _PosteriorSums:
    """Adds up, in float64, the posteriors that one layer reports."""

    def __init__(self, layer: BatchKalmanNorm) -> None:
        self.layer, self.statistics = layer, layer.statistics
        self.weight, self.mean, self.variance = 0.0, torch.zeros(()), torch.zeros(())
        layer.on_posterior = self._add

    def _add(self, found: FilterStatistics, share: Tensor | None, images: int) -> None:
        mean, unbiased = found.moving
        self.mean = self.mean + images * average_over_groups(mean.double(), share)
        self.variance = self.variance + images * average_over_groups(unbiased.double(), share)
        self.weight += images

    def close(self) -> None:
        self.layer.on_posterior, self.layer.statistics = None, self.statistics

    def write(self) -> None:
        if self.weight and self.layer.running_mean is not None and self.layer.running_var is not None:
            self.layer.running_mean.copy_(self.mean / self.weight)
            self.layer.running_var.copy_(self.variance / self.weight)
