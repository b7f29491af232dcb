"""A batch normalized by the posterior of its groups, in the form of its layer: diagonal, matrix, over processes."""

from __future__ import annotations

import functools
import math

import torch
import torch.distributed as dist
from torch import Tensor

from bkn_core.filter.autograd import exactly
from bkn_core.filter.inflation_gradient import Processes, Sensitivity, follow
from bkn_core.filter.kalman import (
    Gaussian,
    Groups,
    Moments,
    diagonal,
    guard,
    in_form_of,
    moments,
    normalize,
    unbiased,
    update,
)
from bkn_core.filter.state import FilterSettings, FilterStatistics
from bkn_core.ops.normalize import Filtered, kalman_normalize
from bkn_core.ops.synchronized import joint_moments, total

Parameters = tuple[Tensor, Tensor | None, Tensor | None]  # gain, γ and β


def normalize_batch(
    x: Tensor,
    prior: Gaussian | None,
    parameters: Parameters,
    settings: FilterSettings,
    sensitivity: Sensitivity | None = None,
    processes: tuple[dist.ProcessGroup | None] | None = None,
) -> Filtered:
    """Normalize a batch by the posterior of each of its groups.

    Args:
        x: activations; may be empty where it is a part of a group, as the other processes must call this too.
        prior: µ', v' or Σ', the same in all processes; None is batch normalization.
        parameters: gain, γ and β; taken in the type of the gain.
        settings: see `FilterSettings`.
        sensitivity: of the layer, where the gradient follows its inflations.
        processes: the group that all of x is a part of, in a tuple; None where x is observed by itself.

    Shape:
        x (N, C, *spatial), prior mean (C,) or (G, C) and variance (..., C) or (..., C, C).
    """
    gain, weight, bias = parameters
    weight, bias = (None if t is None else t if t.dtype is gain.dtype else t.to(gain.dtype) for t in (weight, bias))
    if processes is not None:
        (group,) = processes
        with exactly(x):
            observed = joint_moments(x, group, covariance=settings.is_matrix)
        images = observed.count[0] / x.shape[2:].numel()
        everyone = Processes(dist.get_world_size(group), images, functools.partial(total, group))
        return normalize_by(x, prior, observed, (gain, weight, bias), settings, sensitivity, everyone)
    size = settings.statistics_batch_size
    if settings.is_matrix or (sensitivity is not None and not Groups.of(x.shape[0], size).is_even):
        with exactly(x):
            observed = moments(x, size, covariance=settings.is_matrix)
        return normalize_by(x, prior, observed, (gain, weight, bias), settings, sensitivity)
    return kalman_normalize(x, prior, gain, weight, bias, settings, sensitivity)


def normalize_by(
    x: Tensor,
    prior: Gaussian | None,
    observed: Moments,
    parameters: Parameters,
    settings: FilterSettings,
    sensitivity: Sensitivity | None = None,
    processes: Processes | None = None,
) -> Filtered:
    """Normalize by the posterior from given moments, in the covariance form where S is a matrix.

    Args:
        x: activations.
        prior: µ', v' or Σ'.
        observed: x̄ and S of every group.
        parameters: gain, γ and β.
        settings: see `FilterSettings`.
        sensitivity: h̄, as in `kalman_normalize`; for a diagonal prior.
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
    groups = Groups.of(len(x), settings.statistics_batch_size)
    rows = Gaussian(*map(groups.spread, variances))
    moving = unbiased(posterior, observed, weight_of_seen)
    packed = torch.stack((*variances, *seen, moving.variance, (variances.variance + settings.eps).rsqrt()))
    matrix = posterior.variance if posterior.variance.dim() > posterior.mean.dim() else None
    joint = None if processes is None else processes.images
    y = normalize(x, rows, weight, bias, settings.eps)
    return Filtered(y, FilterStatistics(packed), matrix, joint)
