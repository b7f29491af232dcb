"""What a comparison gives: its result, and the page, tables, picture and JSON that are written of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bkn_core.compare.cells import Cell
from bkn_core.compare.columns import cells_as_csv
from bkn_core.compare.costs import with_costs
from bkn_core.compare.curves import draw_curves
from bkn_core.compare.page import collect, render, see_insides
from bkn_core.compare.rates import choose_rates
from bkn_core.compare.rows import Comparison, Row
from bkn_core.compare.summary import compare_rows, summarize
from bkn_core.compare.table import table
from bkn_core.engine.files import finite, write_json, write_text


@dataclasses.dataclass(frozen=True)
class CompareResult:
    """What a comparison gave.

    Args:
        out: folder of its files.
        cells: the runs.
        summary: mean and spread over the seeds of each norm and statistics batch size.
        comparisons: each row of the summary against the reference row.
        warnings: what makes the runs hard to compare.
        artifacts: the files written: page, json, table, csv, curves.
        target: the accuracy that all were to reach, a fraction; None is the best of the reference of the same seed.
    """

    out: Path
    cells: list[Cell]
    summary: list[Row]
    comparisons: list[Comparison]
    warnings: list[str]
    artifacts: dict[str, Path]
    target: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return cells, summary, comparisons and warnings as JSON takes them, numbers that are not finite as None."""
        cells = [{**dataclasses.asdict(cell), "run": str(cell.run)} for cell in self.cells]
        rows = [dataclasses.asdict(row) for row in self.summary]
        comparisons = [dataclasses.asdict(comparison) for comparison in self.comparisons]
        value = {"cells": cells, "summary": rows, "comparisons": comparisons, "warnings": self.warnings}
        return finite({**value, "target": self.target})  # type: ignore[no-any-return]


def publish(
    out: Path, cells: Sequence[Cell], warnings: Sequence[str] = (), *, target: float | None = None
) -> CompareResult:
    """Choose learning rates, sum up cells and write the report of them, without the page.

    Raises:
        OutputError: a file could not be written.
        InputError: the predictions or metrics of a run are damaged.
    """
    cells = with_costs(choose_rates(cells), target)
    rows = summarize(cells)
    names = {"json": "compare.json", "table": "table.md", "csv": "compare.csv", "curves": "curves.png"}
    artifacts = {name: out / file for name, file in names.items()}
    result = CompareResult(out, cells, rows, compare_rows(rows, cells), list(warnings), artifacts, target)
    write_json(artifacts["json"], {"schema": "bkn.compare/1", **result.to_dict()})
    write_text(artifacts["table"], table(rows, result.comparisons, cells, warnings))
    write_text(artifacts["csv"], cells_as_csv(cells))
    draw_curves(artifacts["curves"], rows, [cell for cell in cells if cell.chosen])
    return result


def with_page(result: CompareResult, *, measure: bool, trusted: bool) -> CompareResult:
    """Write the page of a comparison and return its result with it.

    Args:
        result: the comparison.
        measure: whether to look into runs that were not looked into before; a few seconds.
        trusted: whether these may name data outside the working folder.

    Raises:
        OutputError: it could not be written.
    """
    rows, cells = result.summary, result.cells
    insides = see_insides(rows, cells, measure=measure, trusted=trusted)
    title = result.out.resolve().name
    page = result.out / "report.html"
    write_text(page, render(collect(title, rows, cells, result.comparisons, result.warnings, insides)))
    return dataclasses.replace(result, artifacts={"page": page, **result.artifacts})
