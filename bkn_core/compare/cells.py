"""The cells of a comparison: one run each, and what is told about them while they are run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bkn_core.engine.run_folder import RunFolder
from bkn_core.recipe import Recipe

GROUPLESS = frozenset(
    {"gn", "ln", "in", "fixed", "none", "gn_ws", "online", "frn", "evonorm", "frozen", "reference", "gkn", "normprop"}
)
"""Kinds of normalization that do not look at statistics groups: one run stands for every statistics batch size."""


class Place(NamedTuple):
    """What the cells of a row share: all but seed and learning rate."""

    recipe: str
    model: str
    norm: str
    gradient: int
    statistics: int
    variant: str


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
        recipe: name of its recipe, where several are compared.
        model: name of its network, where several are compared.
        learning_rate: the largest of the schedule.
        chosen: False where another learning rate did better on the validation images: no test image is looked at.
        validation: top-1 of the last epoch on the validation images, by kind of evaluation statistics.
        validation_loss: mean cross entropy, likewise.
        code: kind of the error that it failed with.
        steps: of the optimizer.
        parameters: numbers that are learned.
        peak_memory: bytes, of the process or on the CUDA device.
        target: the accuracy that it was to reach, a fraction.
        steps_to_target: optimizer steps up to the end of the first epoch that reached it.
        seconds_to_target: likewise, of training.
        relative_images_per_second: over those of the reference of the same seed.
        relative_peak_memory: likewise.
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
    recipe: str = ""
    model: str = ""
    learning_rate: float | None = None
    chosen: bool = True
    validation: dict[str, float] = dataclasses.field(default_factory=dict)
    validation_loss: dict[str, float] = dataclasses.field(default_factory=dict)
    code: str = ""
    steps: int | None = None
    parameters: int | None = None
    peak_memory: int | None = None
    target: float | None = None
    steps_to_target: int | None = None
    seconds_to_target: float | None = None
    relative_images_per_second: float | None = None
    relative_peak_memory: float | None = None

    @property
    def place(self) -> Place:
        """The row that it belongs to."""
        return Place(self.recipe, self.model, self.norm, self.gradient, self.statistics, self.variant)


@dataclasses.dataclass(frozen=True)
class CellStarted:
    """A cell's turn has come; `reused` ones are finished already. `index` counts from 1, `name` is the folder."""

    index: int
    total: int
    norm: str
    statistics: int
    seed: int
    reused: bool
    name: str = ""


@dataclasses.dataclass(frozen=True)
class CellMoved:
    """A cell has done this share of its steps."""

    index: int
    total: int
    share: float


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
