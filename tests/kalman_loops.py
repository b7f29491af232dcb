"""The filter once more, in NumPy float64, one group, one channel and one pair of channels at a time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Filtered(NamedTuple):
    """What one pass of the filter gives."""

    y: Array
    mean: Array
    covariance: Array


def groups(images: int, size: int | None) -> list[slice]:
    size = size or images
    return [slice(start, min(start + size, images)) for start in range(0, images, size)]


def observe(x: Array, size: int | None) -> tuple[Array, Array, Array]:
    """Mean (G, C), covariance (G, C, C) and count (G,) of every group."""
    means, covariances, counts = [], [], []
    channels = x.shape[1]
    for group in groups(len(x), size):
        values = np.moveaxis(x[group], 1, 0).reshape(channels, -1)
        mean = np.array([row.sum() / row.size for row in values])
        covariance = np.zeros((channels, channels))
        for i in range(channels):
            for j in range(channels):
                covariance[i, j] = ((values[i] - mean[i]) * (values[j] - mean[j])).sum() / values.shape[1]
        means.append(mean), covariances.append(covariance), counts.append(values.shape[1])
    return np.array(means), np.array(covariances), np.array(counts)


def filtered(
    x: Array,
    prior: tuple[Array, Array] | None,
    gain: float,
    affine: tuple[Array, Array],
    *,
    eps: float,
    size: int | None,
) -> Filtered:
    """Equation 7 for a diagonal prior (C,) or (G, C); the covariance of the posterior is full."""
    means, covariances, _ = observe(x, size)
    y = np.empty_like(x)
    weight, bias = affine
    for g, group in enumerate(groups(len(x), size)):
        mean, covariance = means[g], covariances[g]
        if prior is not None:
            prior_mean, prior_variance = (p if p.ndim == 1 else p[g] for p in prior)
            d = mean - prior_mean
            mean = (1 - gain) * prior_mean + gain * mean
            covariance = (1 - gain) * np.diag(prior_variance) + gain * covariance + gain * (1 - gain) * np.outer(d, d)
        means[g], covariances[g] = mean, covariance
        for image in range(group.start, group.stop):
            for channel in range(x.shape[1]):
                deviation = np.sqrt(covariance[channel, channel] + eps)
                centred = x[image, channel] - mean[channel]
                y[image, channel] = weight[channel] * centred / deviation + bias[channel]
    return Filtered(y, means, covariances)
