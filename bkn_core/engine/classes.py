"""What a classifier takes each class for: the confusion matrix, precision and recall, and their picture."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bkn_core.data.splits import Images
from bkn_core.engine.files import replacing, write_with
from bkn_core.engine.plots import new_figure, plain
from bkn_core.engine.tasks.task import Measured

_NAMED = 40  # classes whose names fit beside the picture
_NUMBERED = 20  # and whose numbers fit into its fields


@dataclasses.dataclass(frozen=True)
class ClassRow:
    """One class: the share of its predictions that are right and of its images that are found, and its images.

    `precision` is None where the class was never predicted, `recall` where it has no image.
    """

    name: str
    precision: float | None
    recall: float | None
    support: int


@dataclasses.dataclass(frozen=True)
class ClassReport:
    """What a classifier takes each class for.

    Args:
        statistics: "population" or "batch": what it normalized by.
        confusion: images by class (row) and predicted class (column); those without a finite loss are in no column.
        rows: one for each class.
        files: the table ("classes"), the matrix ("confusion") and the picture ("confusion_plot").
        unit: what is counted.
    """

    statistics: str
    confusion: NDArray[np.int64] = dataclasses.field(repr=False)
    rows: tuple[ClassRow, ...]
    files: dict[str, Path]
    unit: str = "images"

    def summary(self) -> list[dict[str, Any]]:
        """Return the rows as JSON takes them."""
        return [dataclasses.asdict(row) for row in self.rows]


def report_classes(statistics: str, measured: Measured, images: Images, files: dict[str, Path]) -> ClassReport:
    """Count what each class was taken for and write it as two tables and a picture.

    Raises:
        OutputError: a file could not be written.
    """
    classes = images.classes
    counted, held = measured.confusion(images)
    counts, support = counted.numpy(), held.tolist()
    predicted = counts.sum(0).tolist()
    right = counts.diagonal().tolist()
    rows = tuple(
        ClassRow(name, right[i] / predicted[i] if predicted[i] else None, right[i] / n if n else None, n)
        for i, (name, n) in enumerate(zip(classes, support, strict=True))
    )
    fields = ("precision", "recall", "support")
    lines = [[row.name, *(getattr(row, field) for field in fields)] for row in rows]
    _write_csv(files["classes"], [["class", *fields], *lines])
    matrix = [[name, *line] for name, line in zip(classes, counts.tolist(), strict=True)]
    _write_csv(files["confusion"], [["class \\ predicted", *classes], *matrix])
    _draw(files["confusion_plot"], f"Confusion matrix by {statistics} statistics", counts, classes, support)
    return ClassReport(statistics, counts, rows, files, measured.unit)


def _write_csv(path: Path, lines: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    # The name of a folder, and so of a class, may be no text.
    write_with(path, lambda file: file.write(text.getvalue().encode(errors="surrogateescape")))


def _draw(path: Path, title: str, counts: NDArray[np.int64], classes: Sequence[str], support: Sequence[int]) -> None:
    """Draw the share of each class that was taken for each."""
    shares = counts / np.maximum(np.array(support)[:, None], 1)
    names = [plain(name[:24]) for name in classes]
    side = 3 + 0.42 * min(len(classes), _NAMED)
    figure = new_figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="% of the class", shrink=0.8)
    axis.set(xlabel="predicted class", ylabel="class", title=title)
    if len(classes) <= _NAMED:
        axis.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names)) > 3 else 0, ha="center")
        axis.set_yticks(range(len(names)), names)
    if len(classes) <= _NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                shade = "white" if shares[row, column] > 0.5 else "black"
                axis.text(column, row, str(count), ha="center", va="center", color=shade, fontsize=8)
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
