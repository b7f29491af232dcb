"""What a comparison says of its cells: a row for each kind of run, and each row against a reference."""

from __future__ import annotations

import dataclasses
from typing import Literal

from bkn_core.compare.cells import Cell, Place


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds, the latter NaN for a single one.

    `interval` is the 95 % bootstrap interval of the mean over seeds and test images, None where the seeds were not
    measured on the same images.
    """

    mean: float
    sd: float
    interval: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Rate:
    """A learning rate that was tried for a row: its mean top-1 on validation images, a run without an end as 0."""

    learning_rate: float
    validation: float
    n: int
    unfinished: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """The cells of one norm and statistics batch size, over their seeds.

    Args:
        norm: kind of normalization.
        gradient: images of an optimizer step.
        statistics: images of a statistics group.
        variant: what else tells it from another row.
        n: finished cells.
        top1: by kind of evaluation statistics.
        images_per_second: mean over the finished cells.
        unfinished: how many cells ended otherwise, by how: "diverged", "failed".
        label: a few words that name the row in a table or legend.
        recipe: name of its recipe, where several are compared.
        model: name of its network, where several are compared.
        learning_rate: that of its cells; the one chosen where several were tried.
        edge: "lowest" or "highest" where the chosen one lies at the end of those tried: a better one may lie beyond.
        rates: all that were tried, where these are several.
        parameters: numbers that are learned.
        peak_memory: bytes, mean over the finished cells that know it.
        relative_images_per_second: over the reference of the same seed, mean over the seeds.
        relative_peak_memory: likewise.
        reached: how many cells reached the target.
        steps_to_target: mean over those.
        seconds_to_target: likewise.
    """

    norm: str
    gradient: int
    statistics: int
    variant: str
    n: int
    top1: dict[str, Spread]
    images_per_second: float
    unfinished: dict[str, int] = dataclasses.field(default_factory=dict)
    label: str = ""
    recipe: str = ""
    model: str = ""
    learning_rate: float | None = None
    edge: Literal["", "lowest", "highest"] = ""
    rates: tuple[Rate, ...] = ()
    parameters: int | None = None
    peak_memory: float | None = None
    relative_images_per_second: float | None = None
    relative_peak_memory: float | None = None
    reached: int = 0
    steps_to_target: float | None = None
    seconds_to_target: float | None = None

    @property
    def finished(self) -> str:
        """How many cells finished, and how the others ended."""
        return ", ".join([str(self.n), *(f"{count} {status}" for status, count in self.unfinished.items())])

    @property
    def place(self) -> Place:
        """What its cells share."""
        return Place(self.recipe, self.model, self.norm, self.gradient, self.statistics, self.variant)

    def holds(self, cell: Cell) -> bool:
        """Say whether a cell belongs to this row."""
        return self.place == cell.place


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """Two one-sided t tests (TOST) that the mean difference lies inside (-margin, margin).

    Args:
        margin: a fraction; 0.005 is half a point.
        p: the larger of the two.
        over: the differences that were tested: one for each of the seeds, or for a single seed one for each image.
        equivalent: whether p is below 0.05.
    """

    margin: float
    p: float
    over: Literal["seeds", "images"]
    equivalent: bool


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A row against the reference, over the seeds that both have.

    Args:
        row: label of the row.
        reference: label of the row it is set against.
        mode: kind of evaluation statistics.
        seeds: that both have finished.
        difference: mean of top-1 less the reference's, a fraction.
        interval: of the difference, 95 %, from a paired bootstrap over test images with the trained models given;
            None where the runs were not measured on the same images.
        p_values: exact McNemar test of each seed alone.
        t_p: paired t test over the seeds; None where these are fewer than two or all differences are equal.
        equivalence: whether the row is as good as the reference up to half a point; None where nothing varies.
    """

    row: str
    reference: str
    mode: str
    seeds: tuple[int, ...]
    difference: float
    interval: tuple[float, float] | None
    p_values: dict[int, float]
    t_p: float | None = None
    equivalence: Equivalence | None = None
