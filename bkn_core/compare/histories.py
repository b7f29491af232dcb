"""How far a run had come when: its accuracy by epoch, optimizer step and second."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from bkn_core.compare.cells import Cell
from bkn_core.compare.rows import Row
from bkn_core.engine.run_folder import RunFolder


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
    """Return the epochs of a run by one kind of evaluation statistics, the last record of each."""
    names = (f"validation_{mode}_top1", f"{mode}_top1")
    epochs = {record["epoch"]: record for record in RunFolder(cell.run).records() if record["kind"] == "epoch"}
    last = max((record["step"] for record in epochs.values()), default=0)
    points = []
    for epoch, record in sorted(epochs.items()):
        top1 = next((record[name] for name in names if record.get(name) is not None), None)
        if top1 is not None:
            points.append(Point(epoch, record["step"], _seconds(record, cell, last), 100 * float(top1)))
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


def _seconds(record: dict[str, Any], cell: Cell, last: int) -> float:
    """Return the seconds of training up to a record; of a run that did not write them, its share of the whole."""
    if record.get("seconds") is not None:
        return float(record["seconds"])
    return cell.seconds * record["step"] / last if last else math.nan
