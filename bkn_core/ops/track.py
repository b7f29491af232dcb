"""What layers remember of the forwards of a training: inflations, their uncertainty and moving statistics.

    δ ← δ + K_µ m / sqrt(a + ε),   exp(ι) ← exp(ι) (1 + K_v e_v),   a = v' / exp(ι)
    µ ← (1-α) µ + α mean_G(µ̂),   v likewise, with the unbiased S in v̂

m, e_v and the speeds K stand in `uncertainty.py`. A number that is not finite moves nothing: neither the vector's entry
that it belongs to nor the uncertainty of its layer nor its number of batches. By the kernels of `cpu/track.c` or
`cuda/memory.py` where they can take the tensors, else in PyTorch.
"""

from __future__ import annotations

import array
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from bkn_core.filter.autograd import is_eager
from bkn_core.filter.inflation_gradient import remembered
from bkn_core.filter.kalman import Gaussian, Groups, average_over_groups, diagonal
from bkn_core.filter.state import FilterStatistics, Observation
from bkn_core.filter.uncertainty import (
    IMAGES,
    SLOWEST_IMAGES,
    SLOWEST_STEP,
    Uncertainty,
    bounded,
    error_and_noise,
    residuals,
)
from bkn_core.ops import backend, extension, kernels

LARGEST_INFLATION = 60.0  # the exponent of a float32: no data reach it but beside a variance of 0


def track(observations: Sequence[Observation]) -> None:
    """Move what layers remember towards what they saw."""
    if not observations:
        return
    by_triton = is_eager() and backend.takes_triton(observations[0].statistics.packed.device.type)
    rows = _rows(observations) if by_triton or kernels.are_usable() else None
    is_alone = len(observations) == 1 or len({id(seen.state.past) for seen in observations}) == len(observations)
    by = _track_by_triton if by_triton else extension.track
    before = None if rows is None else by(*rows, is_alone=is_alone)
    if before is not None:
        pasts = [seen.state.past for seen in observations if seen.is_inflated]
        pairs = zip(before[::2], before[1::2], strict=True)
        for past, inflations in reversed(list(zip(pasts, pairs, strict=True))):  # the first of a layer is left
            past[:] = [inflations]
        return
    with torch.no_grad():
        _keep_for_recomputation(observations)
        if rows is None or by_triton or not _track_by_kernel(*rows, is_alone=is_alone):
            _track_in_pytorch(observations)


def joined(observations: Sequence[Observation]) -> list[Observation]:
    """Return one observation for all forwards in which a layer had the same prior: their groups side by side."""
    if any(isinstance(seen.images, Tensor) for seen in observations):  # of groups that span processes
        return list(observations)
    parts: dict[tuple[int, int], list[Observation]] = {}
    for seen in observations:
        parts.setdefault((id(seen.state.past), id(seen.prior)), []).append(seen)
    return [_joined(part) if len(part) > 1 else part[0] for part in parts.values()]


def _joined(observations: Sequence[Observation]) -> Observation:
    first, prior = observations[0], observations[0].prior
    if prior is not None and prior.mean.dim() > 1:
        prior = Gaussian(prior.mean.repeat(len(observations), 1), prior.variance.repeat(len(observations), 1))
    packed = torch.cat([seen.statistics.packed for seen in observations], 1)
    counts = [int(seen.images) for seen in observations]
    share = None
    if len(set(counts)) > 1 or not first.is_even:
        size = first.settings.statistics_batch_size
        share = torch.cat([Groups.of(count, size).counts(packed) for count in counts]) / sum(counts)
    return Observation(first.state, prior, FilterStatistics(packed), sum(counts), first.settings, share)


def _keep_for_recomputation(observations: Sequence[Observation]) -> None:
    """Keep the inflations as they are: a checkpoint that runs the forward again wants what it used."""
    if torch.compiler.is_compiling():
        return
    for state in {id(seen.state.past): seen.state for seen in observations if seen.is_inflated}.values():
        assert state.inflation is not None and state.mean_inflation is not None
        state.past[:] = [(state.inflation.clone(), state.mean_inflation.clone())]


def _rows(observations: Sequence[Observation]) -> tuple[list[extension.Tensors], list[float]] | None:
    """Return the tensors of each observation and three numbers to each, None where the kernel does not know how."""
    rows: list[extension.Tensors] = []
    numbers: list[float] = []
    for seen in observations:
        state, prior, statistics, images, settings, _ = seen
        if not isinstance(images, int) or not seen.is_even:
            return None
        if settings.momentum is None and state.running_mean is not None:
            return None
        *inflations, running_mean, running_var, batches, _ = state
        moved = (None,) * 9 if prior is None or state.inflation is None else (*prior, *inflations)
        rows.append((statistics.packed, *moved, running_mean, running_var, batches))
        by_images = 1 - (1 - SLOWEST_IMAGES) ** (images / IMAGES)
        numbers += max(SLOWEST_STEP, by_images), settings.momentum or 0.0, settings.eps
    return rows, numbers


def _fits(row: extension.Tensors, is_array: Callable[[Tensor], bool]) -> bool:
    """Whether the tensors of a layer are arrays of the shapes that the kernels trust."""
    statistics, mean, variance, *vectors, _ = row
    assert statistics is not None
    groups, width = statistics.shape[1:]
    shapes = ((width,), (width,), (2, width), (2, width), (3, width), (5,), (), (width,), (width,))
    if any(t is not None and not (is_array(t) and t.is_contiguous()) for t in row[:-1]):
        return False
    if any(t is not None and t.shape != shape for t, shape in zip(vectors, shapes, strict=True)):
        return False
    if any(t is not None and t.shape not in ((width,), (groups, width)) for t in (mean, variance)):
        return False
    return mean is None or variance is None or mean.dim() == variance.dim()


def _track_by_triton(
    rows: Sequence[extension.Tensors], numbers: Sequence[float], *, is_alone: bool
) -> list[Tensor] | None:
    """Return the inflations as they were, None where the kernel does not take these tensors."""
    device = rows[0][0].device if rows[0][0] is not None else None

    def is_there(tensor: Tensor) -> bool:
        return tensor.device == device and tensor.dtype is torch.float32

    if not is_alone or not all(_fits(row, is_there) for row in rows):
        return None
    if any(row[-1] is not None and row[-1].device != device for row in rows):
        return None
    from bkn_core.ops.cuda.track import track as launch

    return launch(rows, list(numbers))


def _track_by_kernel(rows: Sequence[extension.Tensors], numbers: Sequence[float], *, is_alone: bool) -> bool:
    """Whether the kernel could take these tensors, and has moved them."""
    fields, moved = array.array("q"), []
    skipped = array.array("q", bytes(8 * len(rows)))
    for i, row in enumerate(rows):
        if not _fits(row, kernels.is_plain):
            return False
        statistics, mean, _, *vectors, _ = row
        assert statistics is not None
        groups, width = statistics.shape[1:]
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


def _track_in_pytorch(observations: Sequence[Observation]) -> None:
    times: dict[int, int] = {}
    keys = []
    for seen in observations:
        layer = id(seen.state.past)
        times[layer] = times.get(layer, 0) + 1  # a layer that ran twice is moved twice, in turn
        keys.append((times[layer], _habits(seen)))
    for numbers in alike(keys):
        chosen = [observations[i] for i in numbers]
        first, statistics = chosen[0], FilterStatistics(beside([seen.statistics.packed for seen in chosen]))
        share = first.parts
        if first.is_inflated:
            _move_inflations(chosen, statistics, share)
        if first.state.running_mean is not None:
            _move_statistics(chosen, statistics, share)


def _habits(seen: Observation) -> Hashable:
    """Return what observations have alike that are moved at once."""
    state, prior, statistics, images, settings, share = seen
    running = None if state.running_mean is None else state.running_mean.dtype
    expects = None if prior is None or state.inflation is None else prior.mean.shape[:-1]
    return (
        statistics.groups, images, statistics.packed.dtype, statistics.packed.device, settings, running, expects,
        None if share is None else id(seen),
    )  # fmt: skip


def _widths(observations: Sequence[Observation]) -> list[int]:
    return [seen.statistics.packed.shape[-1] for seen in observations]


def _each(observations: Sequence[Observation], name: str) -> list[Tensor]:
    """Return one of the tensors that every layer remembers."""
    return existing([getattr(seen.state, name) for seen in observations])


def _move_inflations(observations: Sequence[Observation], statistics: FilterStatistics, share: Tensor | None) -> None:
    widths, eps = _widths(observations), observations[0].settings.eps
    priors = [diagonal(seen.prior) for seen in observations if seen.prior is not None]
    prior = Gaussian(beside([p.mean for p in priors]), beside([p.variance for p in priors]))
    names = "inflation", "mean_inflation", "residual", "sensitivity", "gathered", "uncertainty"
    inflations, shifts, lasts, used, gathered, states = (_each(observations, name) for name in names)
    known = Uncertainty.of(torch.stack(states))
    speeds = known.speeds(observations[0].images)
    wide_speeds = _spread(speeds.to(statistics.packed.dtype), widths)
    seen = residuals(prior, statistics.observed, share, wide_speeds[0], eps)
    before, last, ratio = beside(inflations), beside(lasts), beside(shifts)
    values = bounded(seen.values)
    terms = torch.stack((values * values, values * last, seen.noise))
    means = torch.stack([part.mean(-1) for part in apart(terms, widths)], -2).to(speeds.dtype)
    is_first = known.forwards == 0
    known = known.after(*error_and_noise(means, statistics.groups, speeds, is_first=is_first))
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
        torch._foreach_copy_(target, list(apart(value, widths)))
    torch._foreach_copy_(used, list(apart(remembered(beside(used), beside(gathered)), widths)))
    torch._foreach_zero_(gathered)
    torch._foreach_copy_(states, list(known.state.unbind()))
    for one, gain in zip(observations, known.gains.amax(-1), strict=True):
        if one.state.gain is not None:
            one.state.gain.copy_(gain)


def _spread(values: Tensor, widths: Sequence[int]) -> Tensor:
    """Repeat each layer's pair once for each of its channels: (L, 2) -> (2, ΣC)."""
    return torch.cat([pair.unsqueeze(-1).expand(2, width) for pair, width in zip(values, widths, strict=True)], -1)


def _move_statistics(observations: Sequence[Observation], statistics: FilterStatistics, share: Tensor | None) -> None:
    widths, momentum = _widths(observations), observations[0].settings.momentum
    means, variances = _each(observations, "running_mean"), _each(observations, "running_var")
    counts = _each(observations, "batches")
    present = torch.stack((beside(means), beside(variances)))
    newest = average_over_groups(statistics.moving, share).to(present.dtype)
    is_sound = newest.isfinite().all(0)
    for count, part in zip(counts, apart(is_sound, widths), strict=True):
        count.add_(part.all())
    newest = torch.where(is_sound, newest, present)
    for averages, values in zip((means, variances), newest, strict=True):
        parts = list(apart(values, widths))
        if momentum is None:
            torch._foreach_lerp_(averages, parts, [1 / count.to(values.dtype) for count in counts])
        else:
            torch._foreach_lerp_(averages, parts, momentum)


def alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """Return the positions of equal keys, in the order of their first appearance."""
    if len(keys) == 1:
        return [[0]]  # whose key may hold sizes of an exported graph, which cannot be compared
    found: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return list(found.values())


def beside(vectors: Sequence[Tensor]) -> Tensor:
    """Lay vectors side by side."""
    return vectors[0] if len(vectors) == 1 else torch.cat(list(vectors), -1)


def existing(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the tensors that are there."""
    return [tensor for tensor in tensors if tensor is not None]


def apart(values: Tensor, widths: Sequence[int]) -> Sequence[Tensor]:
    """Split what lies side by side."""
    return (values,) if len(widths) == 1 else torch.split(values, list(widths), -1)
