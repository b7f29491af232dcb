"""What all layers of a model remember, moved by one launch: the table of addresses that it reads. Not run on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkn_core.ops import backend
from bkn_core.ops.cuda import memory

CHANNELS, WARPS = 256, 2  # that one program takes at a time, and how many threads do: more would spill
_tables: dict[tuple[torch.device, int], tuple[list[int], list[float], Tensor, Tensor]] = {}


def _on_device(fields: list[int], numbers: list[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the table and its numbers on the device: what is there already as long as nothing has moved.

    A graph that is captured has a table of its own, written by launches, which are told the addresses; so is the first
    one of so many layers, in a step before the capture, for kernels cannot be compiled meanwhile.
    """
    if backend.is_capturing():
        return _written(fields, numbers, device)
    known = _tables.get((device, len(fields)))
    if known is None:
        known = fields, numbers, *_written(fields, numbers, device)
    elif known[0] != fields or known[1] != numbers:
        table = torch.tensor(fields, dtype=torch.int64).to(device, non_blocking=True)
        known = fields, numbers, table, torch.tensor(numbers, dtype=torch.float32).to(device, non_blocking=True)
    _tables[device, len(fields)] = known
    return known[2], known[3]


def _written(fields: list[int], numbers: list[float], device: torch.device) -> tuple[Tensor, Tensor]:
    table = torch.empty(len(fields), dtype=torch.int64, device=device)
    on_device = torch.empty(len(numbers), device=device)
    for i in range(len(numbers) // 3):
        row = fields[i * memory.FIELDS : (i + 1) * memory.FIELDS]
        memory.write_row[(1,)](table, on_device, i, *numbers[3 * i : 3 * i + 3], *row)
    return table, on_device


def track(rows: Sequence[Sequence[Tensor | None]], numbers: list[float]) -> list[Tensor]:
    """Move what layers remember, and return the inflations of variance and mean as they were, by turns.

    Args:
        rows: of each layer, which must be there once: statistics (6, G, C), prior's mean and variance, what moves of
            `LayerState` in its order; None where there is none.
        numbers: three to a layer: the least speed of its inflations, momentum, ε.
    """
    fields: list[int] = []
    widths: list[int] = []
    kept = 0
    first = next(tensor for tensor in rows[0] if tensor is not None)
    for row in rows:
        statistics, mean, *_ = row
        assert statistics is not None
        groups, width = statistics.shape[1:]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in row]
        stride = 0 if mean is None or mean.dim() == 1 else width
        fields += [groups, width, *addresses[:3], stride, *addresses[3:], kept]
        if mean is not None:
            widths += [width, width]
            kept += 2 * width
    before = torch.empty(kept, device=first.device)
    with torch.cuda.device_of(first):
        table = _on_device(fields, numbers, first.device)
        memory.track[(len(rows),)](*table, before, FIELDS=memory.FIELDS, CHANNELS=CHANNELS, num_warps=WARPS)
    moved = [tensor for row in rows for tensor in row[3:] if tensor is not None]
    torch.autograd.graph.increment_version(moved)
    return list(before.split(widths))
