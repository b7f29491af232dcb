"""What layers remember of the forwards of a training: inflations, their uncertainty and moving statistics.

    δ ← δ + K_µ m / sqrt(a + ε),   exp(ι) ← exp(ι) (1 + K_v e_v),   a = v' / exp(ι)
    µ ← (1-α) µ + α mean_G(µ̂),   v likewise, with the unbiased S in v̂

m, e_v and the speeds K stand in `uncertainty.py`. A number that is not finite moves nothing: neither the vector's entry
that it belongs to nor the uncertainty of its layer nor its number of batches. By the CPU kernels where they can take
the tensors (`cpu/track.c`), else in PyTorch.
"""

from __future__ import annotations

import array
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bkn_core.filter.inflation_gradient import remembered
from bkn_core.filter.kalman import Gaussian, average_over_groups, diagonal
from bkn_core.filter.uncertainty import (
    IMAGES,
    SLOWEST_IMAGES,
    SLOWEST_STEP,
    Uncertainty,
    bounded,
    error_and_noise,
    residuals,
)
from bkn_core.layers.batched import alike, apart, beside, existing
from bkn_core.ops import extension, kernels
from bkn_core.ops.normalize import images_per_group

if TYPE_CHECKING:
    from bkn_core.layers.batch_kalman import BatchKalmanNorm

LARGEST_INFLATION = 60.0  # the exponent of a float32: no data reach it but beside a variance of 0
MOVED = ("innovation", "mean_innovation", "sensitivity", "residual", "gathered_sensitivity", "uncertainty")


class Observation(NamedTuple):
    """What a layer saw in a forward: refined prior, the statistics of `normalize.Filtered`, number of images."""

    layer: BatchKalmanNorm
    prior: Gaussian | None
    statistics: Tensor
    images: int | Tensor  # a tensor where they are those of several processes
    share: Tensor | None = None  # the part of the images that each group holds; None where all are equal


def track(records: Sequence[Observation]) -> None:
    """Move what layers remember towards what they saw."""
    if not records:
        return
    if not torch.compiler.is_compiling():
        for record in records:
            record.layer.__dict__["was_tracked"] = True  # for whoever wants to know which layers ran
    rows = _rows(records) if kernels.are_usable() else None
    is_alone = len(records) == 1 or len({id(record.layer) for record in records}) == len(records)
    before = None if rows is None else extension.track(*rows, is_alone=is_alone)
    if before is not None:
        layers = [record.layer for record in records if _is_inflated(record)]
        pairs = zip(before[::2], before[1::2], strict=True)
        for layer, inflations in reversed(list(zip(layers, pairs, strict=True))):  # the first of a layer is left
            layer.__dict__["inflations_then"] = inflations
        return
    with torch.no_grad():
        _remember_for_recomputation(records)
        if rows is None or not _track_by_kernel(*rows, is_alone=is_alone):
            _track_in_pytorch(records)


def joined(records: Sequence[Observation]) -> list[Observation]:
    """Return one record for all forwards in which a layer had the same prior: their groups side by side."""
    parts: dict[tuple[int, int], list[Observation]] = {}
    for record in records:
        parts.setdefault((id(record.layer), id(record.prior)), []).append(record)
    if any(isinstance(record.images, Tensor) for record in records):  # of groups that span processes
        return list(records)
    return [_joined(alike_ones) if len(alike_ones) > 1 else alike_ones[0] for alike_ones in parts.values()]


def _joined(records: Sequence[Observation]) -> Observation:
    layer, prior, _, images, _ = records[0]
    if prior is not None and prior.mean.dim() > 1:
        prior = Gaussian(prior.mean.repeat(len(records), 1), prior.variance.repeat(len(records), 1))
    statistics = torch.cat([record.statistics for record in records], 1)
    total = sum(int(record.images) for record in records)
    size = layer.statistics_batch_size
    sizes = {int(record.images) for record in records}
    is_even = len(sizes) == 1 and (size is None or images % min(size, images) == 0)
    share = None
    if not is_even:
        share = torch.cat([images_per_group(int(record.images), size, statistics) for record in records]) / total
    return Observation(layer, prior, statistics, total, share)


def _remember_for_recomputation(records: Sequence[Observation]) -> None:
    """Keep the inflations as they are: a checkpoint that runs the forward again wants what it used."""
    if torch.compiler.is_compiling():
        return
    for layer in {id(r.layer): r.layer for r in records if _is_inflated(r)}.values():
        inflation, mean_inflation = layer.innovation, layer.mean_innovation
        assert inflation is not None and mean_inflation is not None
        layer.__dict__["inflations_then"] = inflation.clone(), mean_inflation.clone()


def _is_inflated(record: Observation) -> bool:
    return record.prior is not None and record.layer._buffers["innovation"] is not None


def _is_even(record: Observation) -> bool:
    size, images = record.layer.statistics_batch_size, record.images
    return record.share is None and (isinstance(images, Tensor) or size is None or images % min(size, images) == 0)


def _rows(records: Sequence[Observation]) -> tuple[list[extension.Known], list[float]] | None:
    """Return the tensors of each record and three numbers to each, None where the kernel does not know how."""
    rows: list[extension.Known] = []
    numbers: list[float] = []
    for record in records:
        layer, prior, statistics, images, _ = record
        momentum, own = layer.momentum, layer._buffers  # faster than attributes
        if not isinstance(images, int) or not _is_even(record):
            return None
        if momentum is None and own["running_mean"] is not None:
            return None
        moved: tuple[Tensor | None, ...] = (None,) * 9
        if prior is not None and own["innovation"] is not None:
            gain = own["fixed_gain"] if layer.computes_gain else None
            moved = (*prior, *[own[name] for name in MOVED], gain)
        rows.append((statistics, *moved, own["running_mean"], own["running_var"], own["num_batches_tracked"]))
        by_images = 1 - (1 - SLOWEST_IMAGES) ** (images / IMAGES)
        numbers += max(SLOWEST_STEP, by_images), momentum or 0.0, layer.eps
    return rows, numbers


def _track_by_kernel(rows: Sequence[extension.Known], numbers: Sequence[float], *, is_alone: bool) -> bool:
    """Whether the kernel could take these tensors, and has moved them."""
    fields, moved = array.array("q"), []
    skipped = array.array("q", bytes(8 * len(rows)))
    for i, row in enumerate(rows):
        statistics, mean, variance, *vectors, _ = row
        assert statistics is not None
        groups, width = statistics.shape[1:]
        shapes = ((width,), (width,), (2, width), (2, width), (3, width), (5,), (), (width,), (width,))
        if any(t is not None and not (kernels.is_plain(t) and t.is_contiguous()) for t in row[:-1]):
            return False
        if any(t is not None and t.shape != shape for t, shape in zip(vectors, shapes, strict=True)):
            return False
        if any(t is not None and t.shape not in ((width,), (groups, width)) for t in (mean, variance)):
            return False
        if mean is not None and variance is not None and mean.dim() != variance.dim():
            return False
        stride = 0 if mean is None or mean.dim() == 1 else width
        fields.extend((groups, width, *map(kernels.address, row[:3]), stride, *map(kernels.address, vectors)))
        fields.extend((*map(kernels.bits_of, numbers[3 * i : 3 * i + 3]), skipped.buffer_info()[0] + 8 * i))
        moved += [t for t in vectors if t is not None]
    kernels.run("bkn_track", [len(rows), torch.get_num_threads() if is_alone else 1, fields.buffer_info()[0]])
    torch.autograd.graph.increment_version(moved)
    counts = existing([None if is_skipped else row[-1] for row, is_skipped in zip(rows, skipped, strict=True)])
    if counts:
        torch._foreach_add_(counts, 1)
    return True


def _track_in_pytorch(records: Sequence[Observation]) -> None:
    times: dict[int, int] = {}
    keys = []
    for record in records:
        times[id(record.layer)] = times.get(id(record.layer), 0) + 1  # a layer that ran twice is moved twice, in turn
        keys.append((times[id(record.layer)], _habits(record)))
    for numbers in alike(keys):
        chosen = [records[i] for i in numbers]
        first, layers = chosen[0], [r.layer for r in chosen]
        statistics = beside([record.statistics for record in chosen])
        share = first.share
        if share is None and not _is_even(first) and not isinstance(first.images, Tensor):
            share = images_per_group(first.images, first.layer.statistics_batch_size, statistics) / first.images
        if _is_inflated(first):
            _move_inflations(chosen, statistics, share)
        if layers[0].running_mean is not None:
            _move_statistics(layers, statistics, share)


def _habits(record: Observation) -> Hashable:
    layer, prior = record.layer, record.prior
    running = None if layer.running_mean is None else layer.running_mean.dtype
    expects = None if prior is None or layer.innovation is None else (prior.mean.shape[:-1], layer.eps)
    groups = record.statistics.shape[1]
    return (
        groups, record.images, record.statistics.dtype, record.statistics.device, layer.statistics_batch_size,
        running, layer.momentum, expects, None if record.share is None else id(record),
    )  # fmt: skip


def _move_inflations(records: Sequence[Observation], statistics: Tensor, share: Tensor | None) -> None:
    layers = [record.layer for record in records]
    priors = [diagonal(record.prior) for record in records if record.prior is not None]
    prior = Gaussian(beside([p.mean for p in priors]), beside([p.variance for p in priors]))
    eps, images = layers[0].eps, records[0].images
    inflations, shifts, used, lasts, gathered, states = (
        existing([layer._buffers[name] for layer in layers]) for name in MOVED
    )
    known = Uncertainty.of(torch.stack(states))
    speeds = known.speeds(images)
    wide_speeds = _spread(speeds.to(statistics.dtype), layers)
    seen = residuals(prior, Gaussian(statistics[2], statistics[3]), share, wide_speeds[0], eps)
    before, last, ratio = beside(inflations), beside(lasts), beside(shifts)
    values = bounded(seen.values)
    terms = torch.stack((values * values, values * last, seen.noise))
    means = torch.stack([part.mean(-1) for part in apart(terms, layers)], -2).to(speeds.dtype)
    is_first = known.forwards == 0
    known = known.after(*error_and_noise(means, statistics.shape[1], speeds, is_first=is_first))
    variance = prior.variance if prior.variance.dim() == 1 else average_over_groups(prior.variance, share)
    deviation = (variance / before.exp() + eps).sqrt()
    after = before + torch.log1p(wide_speeds[1] * seen.values[1])
    moved = torch.stack(
        (after.clamp(-LARGEST_INFLATION, LARGEST_INFLATION), ratio + wide_speeds[0] * seen.shift / deviation)
    )
    is_sound = (moved.isfinite() & values.isfinite()).all(0)
    moved = torch.where(is_sound, moved, torch.stack((before, ratio)))
    last = torch.where(values.isfinite().all(0), values, last)
    for target, value in ((inflations, moved[0]), (shifts, moved[1]), (lasts, last)):
        torch._foreach_copy_(target, list(apart(value, layers)))
    torch._foreach_copy_(used, list(apart(remembered(beside(used), beside(gathered)), layers)))
    torch._foreach_zero_(gathered)
    torch._foreach_copy_(states, list(known.state.unbind()))
    gains = known.gains.amax(-1)
    for i, layer in enumerate(layers):
        if layer.computes_gain:
            layer.fixed_gain.copy_(gains[i])


def _spread(values: Tensor, layers: Sequence[BatchKalmanNorm]) -> Tensor:
    """Repeat each layer's pair once for each of its channels: (L, 2) -> (2, ΣC)."""
    parts = [pair.unsqueeze(-1).expand(2, layer.num_features) for pair, layer in zip(values, layers, strict=True)]
    return torch.cat(parts, -1)


def _move_statistics(layers: Sequence[BatchKalmanNorm], statistics: Tensor, share: Tensor | None) -> None:
    counts = existing([layer.num_batches_tracked for layer in layers])
    means, variances = (
        existing([layer.running_mean for layer in layers]),
        existing([layer.running_var for layer in layers]),
    )
    present = torch.stack((beside(means), beside(variances)))
    newest = average_over_groups(statistics[0::4], share).to(present.dtype)
    is_sound = newest.isfinite().all(0)
    for count, part in zip(counts, apart(is_sound, layers), strict=True):
        count.add_(part.all())
    newest = torch.where(is_sound, newest, present)
    for averages, values in zip((means, variances), newest, strict=True):
        parts = list(apart(values, layers))
        if layers[0].momentum is None:
            weights = [1 / count.to(values.dtype) for count in counts]
            torch._foreach_lerp_(averages, parts, weights)
        else:
            torch._foreach_lerp_(averages, parts, layers[0].momentum)
