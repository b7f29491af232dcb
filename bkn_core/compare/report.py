"""What a comparison gives: its result, and the table, picture and JSON that are written of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bkn_core.compare.cells import Cell
from bkn_core.compare.curves import draw_curves
from bkn_core.compare.summary import Comparison, Row, Spread, compare_rows, summarize
from bkn_core.engine.files import finite, write_json, write_text
from bkn_core.kinds import GROUPLESS


@dataclasses.dataclass(frozen=True)
class CompareResult:
    """What a comparison gave.

    Args:
        out: folder of its files.
        cells: the runs.
        summary: mean and spread over the seeds of each norm and statistics batch size.
        comparisons: each row of the summary against the reference row.
        warnings: what makes the runs hard to compare.
        artifacts: the files written: json, table, curves.
    """

    out: Path
    cells: list[Cell]
    summary: list[Row]
    comparisons: list[Comparison]
    warnings: list[str]
    artifacts: dict[str, Path]

    def to_dict(self) -> dict[str, Any]:
        """Return cells, summary, comparisons and warnings as JSON takes them, numbers that are not finite as None."""
        cells = [{**dataclasses.asdict(cell), "run": str(cell.run)} for cell in self.cells]
        rows = [{**dataclasses.asdict(row), "label": row.label} for row in self.summary]
        comparisons = [dataclasses.asdict(comparison) for comparison in self.comparisons]
        value = {"cells": cells, "summary": rows, "comparisons": comparisons, "warnings": self.warnings}
        return finite(value)  # type: ignore[no-any-return]


def publish(out: Path, cells: Sequence[Cell], warnings: Sequence[str] = ()) -> CompareResult:
    """Sum up cells and write the report of them.

    Raises:
        OutputError: a file could not be written.
        InputError: the predictions of a run are damaged.
    """
    rows = summarize(cells)
    artifacts = {"json": out / "compare.json", "table": out / "table.md", "curves": out / "curves.png"}
    result = CompareResult(out, list(cells), rows, compare_rows(rows, cells), list(warnings), artifacts)
    write_json(artifacts["json"], {"schema": "bkn.compare/1", **result.to_dict()})
    write_text(artifacts["table"], table(result))
    draw_curves(artifacts["curves"], rows, cells)
    return result


def table(result: CompareResult) -> str:
    """Return the report as Markdown: the summary, the differences, what failed and what to mind."""
    modes = _modes(result.summary)
    header = ["norm", "g", "s", "n", *(f"top-1 % ({mode})" for mode in modes), "images/s"]
    parts = [_markdown(header, [_summary_line(row, modes) for row in result.summary])]
    if result.comparisons:
        reference = result.comparisons[0].reference
        header = [f"against {reference}", "statistics", "seeds", "difference", "95 % interval", "McNemar p"]
        parts.append(_markdown(header, [_comparison_line(comparison) for comparison in result.comparisons]))
        parts.append("Differences are in percentage points. The interval is a paired bootstrap over the test images.\n")
    failed = [f"- {cell.run.name} {cell.status}: {cell.message}\n" for cell in result.cells if cell.message]
    warned = [f"- {warning}\n" for warning in result.warnings]
    return "\n".join([*parts, *("".join(lines) for lines in (failed, warned) if lines)])


def _modes(rows: Sequence[Row]) -> list[str]:
    return [mode for mode in ("population", "batch") if any(mode in row.top1 for row in rows)]


def _summary_line(row: Row, modes: Sequence[str]) -> list[str]:
    norm = f"{row.norm} ({row.variant})" if row.variant else row.norm
    size = "any" if row.norm in GROUPLESS else str(row.statistics)
    accuracies = [_accuracy(row.top1[mode]) if mode in row.top1 else "–" for mode in modes]
    speed = "–" if math.isnan(row.images_per_second) else f"{row.images_per_second:.0f}"
    return [norm, str(row.gradient), size, row.finished, *accuracies, speed]


def _accuracy(spread: Spread) -> str:
    mean = f"{100 * spread.mean:.2f}"
    return mean if math.isnan(spread.sd) else f"{mean} ± {100 * spread.sd:.2f}"


def _comparison_line(comparison: Comparison) -> list[str]:
    interval = "–"
    if comparison.interval is not None:
        interval = " to ".join(f"{100 * end:+.2f}" for end in comparison.interval)
    p_values = ", ".join(f"{value:.2g}" for value in comparison.p_values.values()) or "–"
    seeds = ", ".join(map(str, comparison.seeds))
    difference = f"{100 * comparison.difference:+.2f}"
    return [comparison.row, comparison.mode, seeds, difference, interval, p_values]


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up as plain text too."""
    cells = [[text.replace("|", "\\|") for text in line] for line in (header, *lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in cells]
    rows = [padded[0], ["-" * width for width in widths], *padded[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
