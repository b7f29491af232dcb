"""The cells of a comparison: one run each, and what is told about them while they are run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from bkn_core.engine.run_folder import RunFolder
from bkn_core.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Args:
        norm: kind of normalization.
        gradient: images of an optimizer step.
        statistics: images of a statistics group.
        seed: of the run.
        status: "finished", "failed" or "diverged".
        run: its folder.
        top1: by kind of evaluation statistics, a fraction; empty unless finished.
        loss: mean cross entropy, likewise.
        images_per_second: of training.
        seconds: of training.
        message: why it failed.
        variant: what else tells its recipe from others of the same norm and sizes, such as `norm.gain=0.02`.
    """

    norm: str
    gradient: int
    statistics: int
    seed: int
    status: Literal["finished", "failed", "diverged"]
    run: Path
    top1: dict[str, float] = dataclasses.field(default_factory=dict)
    loss: dict[str, float] = dataclasses.field(default_factory=dict)
    images_per_second: float = math.nan
    seconds: float = math.nan
    message: str = ""
    variant: str = ""


@dataclasses.dataclass(frozen=True)
class CellStarted:
    """A cell's turn has come; `reused` ones are finished already. `index` counts from 1."""

    index: int
    total: int
    norm: str
    statistics: int
    seed: int
    reused: bool


@dataclasses.dataclass(frozen=True)
class CellEnded:
    """A cell is done, well or badly."""

    index: int
    total: int
    cell: Cell
    reused: bool


def cell_name(recipe: Recipe) -> str:
    """Return the folder name of a recipe's cell: `<norm>-g<g>-s<s>-seed<seed>`."""
    return f"{recipe.norm.kind}-g{recipe.batch.gradient}-s{recipe.batch.statistics}-seed{recipe.train.seed}"


def finished_cell(folder: RunFolder, recipe: Recipe, *, variant: str = "") -> Cell:
    """Return the cell of a finished run, as its summary.json tells it."""
    summary = folder.summary()
    results = summary["results"]
    return Cell(
        **_place(recipe),
        status="finished",
        run=folder.path,
        top1={mode: _number(measured["top1"]) for mode, measured in results.items()},
        loss={mode: _number(measured["loss"]) for mode, measured in results.items()},
        images_per_second=_number(summary["images_per_second"]),
        seconds=_number(summary["seconds"]),
        variant=variant,
    )


def failed_cell(path: Path, recipe: Recipe, status: Literal["failed", "diverged"], message: str) -> Cell:
    """Return the cell of a run that gave nothing but a message."""
    return Cell(**_place(recipe), status=status, run=path, message=message)


def flat_keys(recipe: Recipe) -> dict[str, Any]:
    """Return every value of a recipe by its dotted key."""
    flat: dict[str, Any] = {}
    for section, value in recipe.model_dump().items():
        flat |= (
            {f"{section}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {section: value}
        )
    return flat


def _place(recipe: Recipe) -> dict[str, Any]:
    batch = recipe.batch
    place = {"norm": recipe.norm.kind, "gradient": batch.gradient, "statistics": batch.statistics}
    return {**place, "seed": recipe.train.seed}


def _number(value: float | None) -> float:
    """Read a number of a JSON file, where null stands for one that was not finite."""
    return math.nan if value is None else value
