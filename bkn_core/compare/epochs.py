"""The accuracy of a run after each epoch, as its metrics.jsonl tells."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from bkn_core.engine.run_folder import RunFolder


class Epoch(NamedTuple):
    """The end of an epoch: optimizer steps and seconds of training so far (None in older runs), and top-1."""

    epoch: int
    step: int
    seconds: float | None
    top1: float


def measured_epochs(run: Path, mode: str) -> list[Epoch]:
    """Return the epochs of a run, measured on its validation images where it has some, else on the test images.

    Raises:
        InputError: the rows are damaged.
    """
    names = (f"validation_{mode}_top1", f"{mode}_top1")
    rows = [row for row in RunFolder(run).records() if row["kind"] == "epoch"]
    measured = [(row, next((row[name] for name in names if name in row), None)) for row in rows]
    return [
        Epoch(row["epoch"], row["step"], row.get("seconds"), float(top1)) for row, top1 in measured if top1 is not None
    ]
