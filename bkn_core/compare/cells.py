"""The cells of a comparison: one run each, and what is told about them while they are run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from bkn_core.compare.measured import read_measured
from bkn_core.engine.run_folder import RunFolder
from bkn_core.errors import BknError, DivergedError
from bkn_core.recipe import Recipe


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
        hint: what to do about it.
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
    hint: str = ""
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
    """A cell's turn has come; `reused` ones are finished already.

    `index` counts from 1; `more` says what else tells it from others.
    """

    index: int
    total: int
    norm: str
    statistics: int
    seed: int
    reused: bool
    more: str = ""


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


def reference_place(place: Place, places: Sequence[Place]) -> Place:
    """Return the row that a row is set against, of the same recipe and model, and gradient batch where there is one.

    It is bn with the largest statistics batch size, else the first row.
    """
    same = [other for other in places if (other.recipe, other.model) == (place.recipe, place.model)]
    bn = [other for other in same if other.norm == "bn"]
    near = [other for other in bn if other.gradient == place.gradient] or bn
    return max(near, key=lambda other: other.statistics, default=same[0])


def finished_cell(folder: RunFolder, recipe: Recipe, names: Mapping[str, str] = MappingProxyType({})) -> Cell:
    """Return the cell of a finished run, as its files tell it; `names` are its recipe and model, where several are.

    Raises:
        InputError: a file is missing or damaged.
    """
    measured = read_measured(folder)
    last: dict[str, Any] = next((row for row in reversed(folder.records()) if row["kind"] == "epoch"), {})
    return Cell(
        **_facts(recipe, names),
        status="finished",
        run=folder.path,
        top1={mode: result.top1 for mode, result in measured.results.items()},
        loss={mode: result.loss for mode, result in measured.results.items()},
        images_per_second=measured.images_per_second,
        seconds=measured.seconds,
        validation=_validation(last, "top1"),
        validation_loss=_validation(last, "loss"),
        steps=measured.step,
        parameters=measured.parameters,
        peak_memory=measured.peak_memory,
    )


def failed_cell(path: Path, recipe: Recipe, error: BknError, names: Mapping[str, str]) -> Cell:
    """Return the cell of a run that gave nothing but an error."""
    status: Literal["failed", "diverged"] = "diverged" if isinstance(error, DivergedError) else "failed"
    told = {"message": error.message, "hint": error.hint, "code": error.code}
    return Cell(**_facts(recipe, {**names, **told}), status=status, run=path)


def cell_error(cell: Cell) -> BknError:
    """Return the error that a cell failed with."""
    kinds = {kind.code: kind for kind in BknError.__subclasses__()}
    error = kinds.get(cell.code, BknError)(cell.message, cell.hint)
    error.code = cell.code
    return error


def flat_keys(recipe: Recipe) -> dict[str, Any]:
    """Return every value of a recipe by its dotted key, but for those that no run heeds."""
    flat: dict[str, Any] = {}
    for section, value in recipe.model_dump(exclude={"compare"}).items():
        flat |= (
            {f"{section}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {section: value}
        )
    return flat


def _facts(recipe: Recipe, more: Mapping[str, str]) -> dict[str, Any]:
    batch = recipe.batch
    sizes = {"gradient": batch.gradient, "statistics": batch.statistics}
    return {"norm": recipe.norm.kind, **sizes, "seed": recipe.train.seed, "learning_rate": recipe.optim.lr, **more}


def _validation(row: dict[str, Any], name: str) -> dict[str, float]:
    """Return a measure on the validation images by kind of statistics, from the row of an epoch."""
    keys = {mode: f"validation_{mode}_{name}" for mode in ("population", "batch")}
    return {mode: _number(row[key]) for mode, key in keys.items() if key in row}


def _number(value: float | None) -> float:
    """Read a number of a JSON file, where null stands for one that was not finite."""
    return math.nan if value is None else value
