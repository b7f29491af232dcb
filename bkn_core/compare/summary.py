"""Statistics over cells: mean and spread of each row, and each row against a reference in pairs of images."""

from __future__ import annotations

import dataclasses
import math
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bkn_core.compare.cells import Cell
from bkn_core.errors import InputError
from bkn_core.kinds import GROUPLESS

_RESAMPLES = 9999
_CONFIDENCE = 0.95
Correct = NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; the latter is NaN for a single one."""

    mean: float
    sd: float


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
    """

    norm: str
    gradient: int
    statistics: int
    variant: str
    n: int
    top1: dict[str, Spread]
    images_per_second: float
    unfinished: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def finished(self) -> str:
        """How many cells finished, and how the others ended."""
        return ", ".join([str(self.n), *(f"{count} {status}" for status, count in self.unfinished.items())])

    @property
    def label(self) -> str:
        """A few words that name the row in a table or legend."""
        sizes = self.norm if self.norm in GROUPLESS else f"{self.norm} s={self.statistics}"
        return f"{sizes} ({self.variant})" if self.variant else sizes

    def holds(self, cell: Cell) -> bool:
        """Say whether a cell belongs to this row."""
        return (self.norm, self.gradient, self.statistics, self.variant) == _place(cell)


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
    """

    row: str
    reference: str
    mode: str
    seeds: tuple[int, ...]
    difference: float
    interval: tuple[float, float] | None
    p_values: dict[int, float]


def summarize(cells: Sequence[Cell]) -> list[Row]:
    """Return one row for every norm, batch sizes and variant, in the order of the cells."""
    places = dict.fromkeys(_place(cell) for cell in cells)
    return [_row(place, [cell for cell in cells if _place(cell) == place]) for place in places]


def compare_rows(rows: Sequence[Row], cells: Sequence[Cell]) -> list[Comparison]:
    """Set every row against the reference: bn with the largest statistics batch size, else the first row.

    Raises:
        InputError: the predictions of a run are damaged.
    """
    reference = max((row for row in rows if row.norm == "bn"), key=lambda row: row.statistics, default=rows[0])
    theirs = _by_seed(reference, cells)
    comparisons = []
    for row in rows:
        if row is reference:
            continue
        ours = _by_seed(row, cells)
        seeds = tuple(sorted(ours.keys() & theirs.keys()))
        pairs = {seed: (ours[seed], theirs[seed]) for seed in seeds}
        modes = [mode for mode in row.top1 if mode in reference.top1 and seeds]
        comparisons += [_comparison(row, reference, mode, pairs) for mode in modes]
    return comparisons


def paired_interval(ours: Correct, theirs: Correct) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean difference, images drawn in pairs.

    A difference takes few values, so that a resample is a draw of how often each occurs: the same distribution as
    drawing images one by one, at a cost that does not grow with them.

    Args:
        ours: which images each model gets right, (seeds, images).
        theirs: the same of the reference.
    """
    differences = (ours.astype(np.int64) - theirs).sum(0)
    values, counts = np.unique(differences, return_counts=True)
    images = len(differences)
    drawn = np.random.default_rng(0).multinomial(images, counts / images, size=_RESAMPLES)
    means = drawn @ values / (images * len(ours))
    low, high = np.quantile(means, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)


def mcnemar(ours: Correct, theirs: Correct) -> float:
    """Return the two-sided exact McNemar p of two models on the same images, (images,) each."""
    from scipy.stats import binomtest

    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    if only_ours + only_theirs == 0:
        return 1.0
    return float(binomtest(only_ours, only_ours + only_theirs).pvalue)


def _place(cell: Cell) -> tuple[str, int, int, str]:
    return cell.norm, cell.gradient, cell.statistics, cell.variant


def _row(place: tuple[str, int, int, str], cells: Sequence[Cell]) -> Row:
    finished = [cell for cell in cells if cell.status == "finished"]
    modes = dict.fromkeys(mode for cell in finished for mode in cell.top1)
    top1 = {mode: _spread([cell.top1[mode] for cell in finished if mode in cell.top1]) for mode in modes}
    speed = float(np.mean([cell.images_per_second for cell in finished])) if finished else math.nan
    unfinished: Counter[str] = Counter(cell.status for cell in cells if cell.status != "finished")
    return Row(*place, len(finished), top1, speed, dict(unfinished))


def _spread(values: Sequence[float]) -> Spread:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Spread(float(np.mean(values)), sd)


def _by_seed(row: Row, cells: Sequence[Cell]) -> dict[int, Cell]:
    return {cell.seed: cell for cell in cells if row.holds(cell) and cell.status == "finished"}


def _comparison(row: Row, reference: Row, mode: str, pairs: dict[int, tuple[Cell, Cell]]) -> Comparison:
    difference = float(np.mean([ours.top1[mode] - theirs.top1[mode] for ours, theirs in pairs.values()]))
    correct = {seed: _correct_pair(*pair, mode) for seed, pair in pairs.items()}
    known = {seed: pair for seed, pair in correct.items() if pair is not None}
    sizes = {len(pair[0]) for pair in known.values()}
    interval = None
    if len(known) == len(pairs) and len(sizes) == 1:
        ours, theirs = (np.stack(side) for side in zip(*known.values(), strict=True))
        interval = paired_interval(ours, theirs)
    p_values = {seed: mcnemar(*pair) for seed, pair in known.items()}
    return Comparison(row.label, reference.label, mode, tuple(pairs), difference, interval, p_values)


def _correct_pair(ours: Cell, theirs: Cell, mode: str) -> tuple[Correct, Correct] | None:
    """Return what two runs get right, or None where they were measured on other images."""
    (our_labels, our_correct), (labels, correct) = (_predictions(cell.run, mode) for cell in (ours, theirs))
    return (our_correct, correct) if np.array_equal(our_labels, labels) else None


def _predictions(run: Path, mode: str) -> tuple[NDArray[Any], Correct]:
    """Return the labels of the test images and which of them a run gets right."""
    path = run / "predictions.npz"
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError("there is no such file")
        with open(path, "rb") as file, np.load(file) as arrays:
            labels = arrays["labels"]
            # As in the run's own measure, an image without a finite loss is a mistake.
            correct = (arrays[f"{mode}_predictions"] == labels) & np.isfinite(arrays[f"{mode}_losses"])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read: {error}", "Leave this run out, or train it again.") from error
    return labels, correct
