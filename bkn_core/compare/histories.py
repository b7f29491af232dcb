"""How far a run had come when: its accuracy by epoch, optimizer step and second."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from bkn_core.compare.cells import Cell
from bkn_core.compare.epochs import measured_epochs
from bkn_core.compare.rows import Row
from bkn_core.engine.run_folder import RunFolder
from bkn_core.errors import InputError


@dataclasses.dataclass(frozen=True)
class Point:
    """The end of an epoch.

    Args:
        epoch: counted from 1.
        step: optimizer steps so far.
        seconds: of training so far; NaN where the run does not say.
        top1: in %, on the validation images where the run has some, else on the test images.
    """

    epoch: int
    step: int
    seconds: float
    top1: float


def history(cell: Cell, mode: str) -> list[Point]:
    """Return the epochs of a run by one kind of evaluation statistics, the last record of each.

    A run that did not write its seconds gets equal parts of them for its steps. One that did not finish may be damaged,
    and then has no epochs.
    """
    try:
        epochs = {epoch.epoch: epoch for epoch in measured_epochs(cell.run, mode)}
    except InputError:
        if cell.status == "finished":
            raise
        epochs = {}
    last = max((epoch.step for epoch in epochs.values()), default=0)
    points = []
    for number, epoch in sorted(epochs.items()):
        part = cell.seconds * epoch.step / last if last else math.nan
        seconds = part if epoch.seconds is None else epoch.seconds
        points.append(Point(number, epoch.step, seconds, 100 * epoch.top1))
    return points


def common_points(row: Row, cells: Sequence[Cell], mode: str) -> list[tuple[Point, ...]]:
    """Return, for each epoch that all finished runs of a row have, their points of it."""
    histories = [
        {point.epoch: point for point in history(cell, mode)}
        for cell in cells
        if row.holds(cell) and cell.chosen and mode in cell.top1
    ]
    common = [epoch for epoch in (histories[0] if histories else ()) if all(epoch in other for other in histories)]
    return [tuple(points[epoch] for points in histories) for epoch in common]


def measured_on(cells: Sequence[Cell]) -> str:
    """Name the images that the epochs of the finished runs were measured on."""
    rows = [RunFolder(cell.run).records() for cell in cells if cell.top1]
    held_out = {any(key.startswith("validation_") for record in records for key in record) for records in rows}
    return " or ".join(name for name, flag in (("test", False), ("validation", True)) if flag in held_out) or "test"
