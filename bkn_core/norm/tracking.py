"""What layers remember of the forwards of a training: innovations and moving statistics, moved for all layers at once.

    exp(ι) ← (1-w) exp(ι) + w N / v',   w = 1 - 0.94^(n / 128),   v' the prior without exp(ι),   |ι| <= 2
    µ ← (1-α) µ + α mean_G(µ̂),   v likewise, with the unbiased S in v̂

By the CPU kernels where they can take the tensors (`kernels/track.c`), else in PyTorch.
"""

from __future__ import annotations

import array
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bkn_core.norm import compiled_node, following, native
from bkn_core.norm.fused import images_per_group
from bkn_core.norm.kalman import Gaussian, average_over_groups, diagonal, log_innovation
from bkn_core.norm.together import alike, apart, beside, those

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


def track(records: Sequence[Seen]) -> None:
    """Move the innovations and the moving statistics of layers towards what they saw."""
    if not records:
        return
    rows = _rows(records) if native.are_usable() else None
    is_alone = len(records) == 1 or len({id(record.layer) for record in records}) == len(records)
    before = None if rows is None else compiled_node.track(*rows, is_alone=is_alone)
    if before is not None:
        layers = [record.layer for record in records if _is_innovated(record)]
        for layer, innovation in zip(reversed(layers), reversed(before), strict=True):  # the first of a layer is left
            layer.__dict__["innovation_then"] = innovation
        return
    with torch.no_grad():
        _remember_for_recomputation(records)
        if rows is None or not _track_by_kernel(*rows, is_alone=is_alone):
            _track_in_pytorch(records)


def _remember_for_recomputation(records: Sequence[Seen]) -> None:
    """Keep the innovations as they are: a checkpoint that runs the forward again wants what it used."""
    if torch.compiler.is_compiling():
        return
    layers = list({id(r.layer): r.layer for r in records if _is_innovated(r)}.values())
    innovations = those([layer._buffers["innovation"] for layer in layers])
    for numbers in alike([(innovation.dtype, innovation.device) for innovation in innovations]):
        chosen = [layers[i] for i in numbers]
        before = torch.cat([innovations[i] for i in numbers])
        for layer, innovation in zip(chosen, apart(before, chosen), strict=True):
            layer.__dict__["innovation_then"] = innovation  # past `nn.Module.__setattr__`, which is slow


def _is_innovated(record: Seen) -> bool:
    return record.prior is not None and record.layer._buffers["innovation"] is not None


def weight_of_newest(momentum: float, images: int | Tensor) -> float | Tensor:
    """Return the weight of so many images in an innovation: the same for a step however it is split."""
    return 1 - (1 - momentum) ** (images / following.IMAGES)


def _rows(records: Sequence[Seen]) -> tuple[list[compiled_node.Known], list[float]] | None:
    """Return the tensors of each record and three numbers to each, None where the kernel does not know how."""
    rows: list[compiled_node.Known] = []
    numbers: list[float] = []
    for layer, prior, statistics, images, held in records:
        size, momentum, own = layer.statistics_batch_size, layer.momentum, layer._buffers  # faster than attributes
        if not isinstance(images, int) or (size is not None and images % min(size, images)):
            return None
        if momentum is None and own["running_mean"] is not None:
            return None
        innovation = None if prior is None else own["innovation"]
        if prior is None or innovation is None:
            innovated: tuple[Tensor | None, ...] = (None,) * 6
        else:
            inside = innovation if held is None else held
            innovated = (*prior, inside, innovation, own["sensitivity"], own["newest_sensitivity"])
        rows.append((statistics, *innovated, own["running_mean"], own["running_var"], own["num_batches_tracked"]))
        numbers += float(weight_of_newest(layer.innovation_momentum, images)), momentum or 0.0, layer.eps
    return rows, numbers


def _track_by_kernel(rows: Sequence[compiled_node.Known], numbers: Sequence[float], *, is_alone: bool) -> bool:
    """Whether the kernel could take these tensors, and has moved them."""
    fields, moved = array.array("q"), []
    for i, row in enumerate(rows):
        statistics, mean, variance, *vectors, _ = row
        assert statistics is not None
        groups, width = statistics.shape[1:]
        if any(t is not None and not (native.is_plain(t) and t.is_contiguous()) for t in row[:-1]):
            return False
        if any(vector is not None and vector.shape != (width,) for vector in vectors):
            return False
        if any(t is not None and t.shape not in ((width,), (groups, width)) for t in (mean, variance)):
            return False
        if mean is not None and variance is not None and mean.dim() != variance.dim():
            return False
        stride = 0 if mean is None or mean.dim() == 1 else width
        fields.extend((groups, width, *map(native.address, row[:3]), stride, *map(native.address, vectors)))
        fields.extend(map(native.bits_of, numbers[3 * i : 3 * i + 3]))
        moved += [t for t in (*row[4:6], *row[7:9]) if t is not None]
    native.run("bkn_track", [len(rows), torch.get_num_threads() if is_alone else 1, fields.buffer_info()[0]])
    torch.autograd.graph.increment_version(moved)
    counts = those([row[-1] for row in rows])
    if counts:
        torch._foreach_add_(counts, 1)
    return True


def _track_in_pytorch(records: Sequence[Seen]) -> None:
    times: dict[int, int] = {}
    keys = []
    for record in records:
        times[id(record.layer)] = times.get(id(record.layer), 0) + 1  # a layer that ran twice is moved twice, in turn
        keys.append((times[id(record.layer)], _habits(record)))
    for numbers in alike(keys):
        chosen = [records[i] for i in numbers]
        images, size, layers = chosen[0].images, chosen[0].layer.statistics_batch_size, [r.layer for r in chosen]
        statistics = beside([record.statistics for record in chosen])
        is_even = isinstance(images, Tensor) or size is None or images % min(size, images) == 0
        share = None if isinstance(images, Tensor) or is_even else images_per_group(images, size, statistics) / images
        if _is_innovated(chosen[0]):
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
    prior = Gaussian(beside([p.mean for p in priors]), beside([p.variance for p in priors]))
    innovations = those([layer.innovation for layer in layers])
    ratio = log_innovation(prior, Gaussian(statistics[2], statistics[3]), share, layers[0].eps)
    before = torch.cat(innovations, -1).to(ratio.dtype)
    pairs = zip(records, innovations, strict=True)
    inside = torch.cat([present if record.innovation is None else record.innovation for record, present in pairs], -1)
    # The mean of ratios, not of their logarithms: few images at a time must not make it smaller.
    weight = weight_of_newest(layers[0].innovation_momentum, records[0].images)
    ratio = torch.lerp(before.exp(), (ratio + inside).clamp_(-_FARTHEST, _FARTHEST).exp(), weight)
    after = ratio.log().clamp_(-INNOVATION_LIMIT, INNOVATION_LIMIT).to(innovations[0].dtype)
    torch._foreach_copy_(innovations, list(apart(after, layers)))
    newest = those([layer.newest_sensitivity for layer in layers])
    torch._foreach_copy_(those([layer.sensitivity for layer in layers]), newest)


def _move_statistics(layers: Sequence[BatchKalmanNorm], statistics: Tensor, share: Tensor | None) -> None:
    counts = those([layer.num_batches_tracked for layer in layers])
    torch._foreach_add_(counts, 1)
    means, variances = those([layer.running_mean for layer in layers]), those([layer.running_var for layer in layers])
    moved = average_over_groups(statistics[0::4], share).to(means[0].dtype)
    for averages, values in zip((means, variances), moved, strict=True):
        parts = list(apart(values, layers))
        if layers[0].momentum is None:
            weights = [1 / count.to(values.dtype) for count in counts]
            torch._foreach_lerp_(averages, parts, weights)
        else:
            torch._foreach_lerp_(averages, parts, layers[0].momentum)
