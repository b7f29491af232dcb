"""Normalization by the posterior with a full covariance per statistics group, by the plain functions of `kalman`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bkn_core.filter.inflation_gradient import Processes, Sensitivity, follow
from bkn_core.filter.kalman import (
    Gaussian,
    Moments,
    diagonal,
    guard,
    in_form_of,
    moments,
    normalize,
    spread_over_images,
    unbiased,
    update,
)
from bkn_core.filter.state import FilterSettings, FilterStatistics
from bkn_core.ops.normalize import Filtered


def matrix_normalize(
    x: Tensor,
    prior: Gaussian | None,
    gain: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    settings: FilterSettings,
    sensitivity: Sensitivity | None = None,
) -> Filtered:
    """Normalize every group by the diagonal of its posterior; as `normalize.kalman_normalize`, with matrices S and Σ̂.

    Shape:
        x (N, C, *spatial), prior mean (C,) or (G, C) and variance (..., C) or (..., C, C).
    """
    observed = moments(x, settings.statistics_batch_size, covariance=True)
    return normalize_by(x, prior, observed, (gain, weight, bias), settings, sensitivity)


def normalize_by(
    x: Tensor,
    prior: Gaussian | None,
    observed: Moments,
    parameters: tuple[Tensor, Tensor | None, Tensor | None],
    settings: FilterSettings,
    sensitivity: Sensitivity | None = None,
    processes: Processes | None = None,
) -> Filtered:
    """Normalize by the posterior from given moments, in the covariance form where S is a matrix.

    Args:
        x: activations.
        prior: as in `matrix_normalize`.
        observed: x̄ and S of every group.
        parameters: gain, γ and β.
        settings: see `FilterSettings`.
        sensitivity: h̄, as in `normalize.kalman_normalize`; for a diagonal prior.
        processes: where the moments are those of several processes.
    """
    gain, weight, bias = parameters
    seen = diagonal(Gaussian(observed.mean, observed.variance))
    posterior, weight_of_seen = Gaussian(observed.mean, observed.variance), torch.ones_like(gain)
    if prior is not None:
        weight_of_seen = gain
        if sensitivity is not None and prior.variance.dim() == prior.mean.dim():
            share = observed.count[:, None] / observed.count.sum()
            images = len(x) if processes is None else processes.images
            prior = follow(prior, seen, share, settings.eps, sensitivity, images, processes)
        if not math.isinf(settings.guard_limit):
            weight_of_seen = guard(diagonal(prior).variance, seen.variance, gain, settings.guard_limit)
        posterior = update(in_form_of(prior, observed), observed, weight_of_seen)
    variances = diagonal(posterior)
    size = settings.statistics_batch_size
    rows = Gaussian(*(spread_over_images(values, len(x), size) for values in variances))
    moving = unbiased(posterior, observed, weight_of_seen)
    packed = torch.stack((*variances, *seen, moving.variance, (variances.variance + settings.eps).rsqrt()))
    matrix = posterior.variance if posterior.variance.dim() > posterior.mean.dim() else None
    joint = None if processes is None else processes.images
    y = normalize(x, rows, weight, bias, settings.eps)
    return Filtered(y, FilterStatistics(packed), matrix, joint)
