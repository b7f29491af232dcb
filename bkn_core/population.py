"""Which statistics normalize at inference, and re-estimating the population's with fixed weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from bkn_core.errors import ConversionError
from bkn_core.filter.kalman import Gaussian, average_over_groups
from bkn_core.layers.batch_kalman import BatchKalmanNorm, Statistics


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

    def _add(self, posterior: Gaussian, share: Tensor | None, images: int) -> None:
        self.mean = self.mean + images * average_over_groups(posterior.mean.double(), share)
        self.variance = self.variance + images * average_over_groups(posterior.variance.double(), share)
        self.weight += images

    def close(self) -> None:
        self.layer.on_posterior, self.layer.statistics = None, self.statistics

    def write(self) -> None:
        if self.weight and self.layer.running_mean is not None and self.layer.running_var is not None:
            self.layer.running_mean.copy_(self.mean / self.weight)
            self.layer.running_var.copy_(self.variance / self.weight)
