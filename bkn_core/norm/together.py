"""What layers do to small vectors, done for many layers at once: a few operations on all channels, not a few per layer.

A network has dozens of normalization layers, and an operation on a vector of channels costs its overhead, not its
arithmetic. Vectors of layers that are alike are laid side by side, computed on, and split again.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bkn_core.norm import following
from bkn_core.norm.fused import images_per_group
from bkn_core.norm.kalman import Gaussian, average_over_groups, diagonal, log_innovation

if TYPE_CHECKING:
    from bkn_core.norm.layers import BatchKalmanNorm

INNOVATION_LIMIT = 2.0
_FARTHEST = 8.0  # a log ratio beyond it is an outlier, which a running mean of ratios would take long to forget


class Seen(NamedTuple):
    """What a layer saw in one forward: its refined prior, the statistics of `fused.Filtered`, the number of images, and
    the innovation that the prior holds, where that is not the present one.
    """

    layer: BatchKalmanNorm
    prior: Gaussian | None
    statistics: Tensor
    images: int | Tensor  # a tensor where they are those of several processes
    innovation: Tensor | None = None


def _alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """Return the positions of equal keys, in the order of their first appearance."""
    if len(keys) == 1:
        return [[0]]  # whose key may hold sizes of an exported graph, which cannot be compared
    found: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return list(found.values())


def _beside(vectors: Sequence[Tensor]) -> Tensor:
    return vectors[0] if len(vectors) == 1 else torch.cat(list(vectors), -1)


def _those(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _apart(values: Tensor, layers: Sequence[BatchKalmanNorm]) -> Sequence[Tensor]:
    return (values,) if len(layers) == 1 else torch.split(values, [layer.num_features for layer in layers], -1)


def refine(layers: Sequence[BatchKalmanNorm], priors: Sequence[Gaussian]) -> list[Gaussian]:
    """Apply each layer's learned correction and innovation to its prior.

    µ' + δ sqrt(v' + ε),   v' exp(ρ + innovation)
    """
    refined = list(priors)
    for numbers in _alike([_form(*pair) for pair in zip(layers, priors, strict=True)]):
        chosen = [layers[i] for i in numbers]
        mean = _beside([priors[i].mean for i in numbers])
        variance = _beside([priors[i].variance for i in numbers])
        log_scale = None
        if chosen[0].prior_offset is not None:
            offset = _beside(_those([layer.prior_offset for layer in chosen]))
            mean = torch.addcmul(mean, offset, (variance + chosen[0].eps).sqrt())
            log_scale = _beside(_those([layer.prior_log_scale for layer in chosen]))
        if chosen[0].innovation is not None:
            innovation = _beside(_those([layer.present_innovation for layer in chosen]))
            log_scale = innovation if log_scale is None else log_scale + innovation
        if log_scale is not None:
            variance = variance * log_scale.exp()
        for i, *parts in zip(numbers, _apart(mean, chosen), _apart(variance, chosen), strict=True):
            refined[i] = Gaussian(*parts)
    return refined


def _form(layer: BatchKalmanNorm, prior: Gaussian) -> Hashable:
    if prior.variance.dim() > prior.mean.dim():
        return id(layer)  # matrices of different sizes cannot be laid side by side
    corrected, observed = layer.prior_offset is not None, layer.innovation is not None
    return corrected, observed, layer.eps, prior.mean.shape[:-1], prior.mean.dtype, prior.mean.device


def gains(layers: Sequence[BatchKalmanNorm]) -> list[Tensor]:
    """Return each layer's gain q, schedule included."""
    found = [layer.fixed_gain if layer.gain_logit is None else layer.gain_logit for layer in layers]
    for numbers in _alike([(layers[i].gain_logit is None, v.dtype, v.device) for i, v in enumerate(found)]):
        values = torch.stack([found[i] for i in numbers])
        if layers[numbers[0]].gain_logit is not None:
            values = values.sigmoid()
        factors = torch.stack([layers[i].gain_factor for i in numbers])
        for i, gain in zip(numbers, (values * factors).unbind(), strict=True):
            found[i] = gain
    return found


@torch.no_grad()
def track(records: Sequence[Seen]) -> None:
    """Move the innovations and the moving statistics of layers towards what they saw."""
    times: dict[int, int] = {}
    keys = []
    for record in records:
        times[id(record.layer)] = times.get(id(record.layer), 0) + 1  # a layer that ran twice is moved twice, in turn
        keys.append((times[id(record.layer)], _habits(record)))
    for numbers in _alike(keys):
        chosen = [records[i] for i in numbers]
        images, size, layers = chosen[0].images, chosen[0].layer.statistics_batch_size, [r.layer for r in chosen]
        statistics = _beside([record.statistics for record in chosen])
        is_even = isinstance(images, Tensor) or size is None or images % min(size, images) == 0
        share = None if isinstance(images, Tensor) or is_even else images_per_group(images, size, statistics) / images
        if chosen[0].prior is not None and layers[0].innovation is not None:
            _move_innovations(chosen, statistics, share)
        if layers[0].running_mean is not None:
            _move_statistics(layers, statistics, share)


def _habits(record: Seen) -> Hashable:
    layer, prior = record.layer, record.prior
    running = None if layer.running_mean is None else layer.running_mean.dtype
    expects = None if prior is None or layer.innovation is None else (prior.mean.shape[:-1], layer.eps)
    groups = record.statistics.shape[1]
    return (
        groups, record.images, record.statistics.dtype, record.statistics.device, layer.statistics_batch_size,
        running, layer.momentum, expects, layer.innovation_momentum,
    )  # fmt: skip


def _move_innovations(records: Sequence[Seen], statistics: Tensor, share: Tensor | None) -> None:
    layers = [record.layer for record in records]
    priors = [diagonal(record.prior) for record in records if record.prior is not None]
    prior = Gaussian(_beside([p.mean for p in priors]), _beside([p.variance for p in priors]))
    innovations = [layer.innovation for layer in layers if layer.innovation is not None]
    ratio = log_innovation(prior, Gaussian(statistics[2], statistics[3]), share, layers[0].eps)
    before = torch.cat(innovations, -1).to(ratio.dtype)
    if not torch.compiler.is_compiling():  # a checkpoint that runs the forward again wants what it used
        for layer, innovation in zip(layers, _apart(before, layers), strict=True):
            layer.innovation_then = innovation
    pairs = zip(records, innovations, strict=True)
    inside = torch.cat([present if record.innovation is None else record.innovation for record, present in pairs], -1)
    # The mean of ratios, not of their logarithms: few images at a time must not make it smaller.
    weight = 1 - (1 - layers[0].innovation_momentum) ** (records[0].images / following.IMAGES)
    ratio = torch.lerp(before.exp(), (ratio + inside).clamp_(-_FARTHEST, _FARTHEST).exp(), weight)
    after = ratio.log().clamp_(-INNOVATION_LIMIT, INNOVATION_LIMIT).to(innovations[0].dtype)
    torch._foreach_copy_(innovations, list(_apart(after, layers)))
    newest = _those([layer.newest_sensitivity for layer in layers])
    torch._foreach_copy_(_those([layer.sensitivity for layer in layers]), newest)


def _move_statistics(layers: Sequence[BatchKalmanNorm], statistics: Tensor, share: Tensor | None) -> None:
    counts = _those([layer.num_batches_tracked for layer in layers])
    torch._foreach_add_(counts, 1)
    means, variances = _those([layer.running_mean for layer in layers]), _those([layer.running_var for layer in layers])
    moved = average_over_groups(statistics[0::4], share).to(means[0].dtype)
    for averages, values in zip((means, variances), moved, strict=True):
        parts = list(_apart(values, layers))
        if layers[0].momentum is None:
            weights = [1 / count.to(values.dtype) for count in counts]
            torch._foreach_lerp_(averages, parts, weights)
        else:
            torch._foreach_lerp_(averages, parts, layers[0].momentum)
