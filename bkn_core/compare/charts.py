"""The pictures of a page that show accuracy: while training, by the size of groups, against the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bkn_core.compare.cells import Cell
from bkn_core.compare.curves import draw_row, draw_unfinished
from bkn_core.compare.drawing import Picture, new_axis, to_picture
from bkn_core.compare.histories import common_points, history, measured_on
from bkn_core.compare.looks import Look, give_looks, series
from bkn_core.compare.rows import Comparison, Row
from bkn_core.compare.words import MODES
from bkn_core.engine.plots import count_percent, plain
from bkn_core.kinds import GROUPLESS

_OVER = {"step": "optimizer steps", "seconds": "seconds of training"}
_EQUAL = 0.5  # points: half a one is no difference


def draw_training(rows: Sequence[Row], cells: Sequence[Cell], mode: str, over: str) -> Picture | None:
    """Draw accuracy against steps or seconds; None where no run has an epoch."""
    figure, axis = new_axis()
    for row, look in zip(rows, give_looks(rows), strict=True):
        draw_row(axis, common_points(row, cells, mode), over, look, plain(row.label))
        for cell in cells:
            if row.holds(cell) and cell.status != "finished" and cell.chosen:
                draw_unfinished(axis, history(cell, mode), over, look, plain(row.label))
    if not any(len(line.get_xdata()) for line in axis.get_lines()):
        return None
    axis.set(xlabel=_OVER[over], ylabel=f"{measured_on(cells)} top-1 in %")
    axis.set_xlim(left=0)
    axis.xaxis.get_major_locator().set_params(integer=over == "step", min_n_ticks=1)
    count_percent(axis)
    words = f"Accuracy against {_OVER[over]}, {MODES[mode]}. It ends at: {_ends(rows, mode)}."
    return to_picture(figure, f"{mode}-{over}", f"Against {_OVER[over]}, {MODES[mode]}", words)


def draw_sizes(rows: Sequence[Row], mode: str) -> Picture | None:
    """Draw accuracy by statistics batch size with its deviation over seeds; None where there is but one size."""
    measured = [(row, look) for row, look in zip(rows, give_looks(rows), strict=True) if mode in row.top1]
    sizes = sorted({row.statistics for row, _ in measured if row.norm not in GROUPLESS})
    if len(sizes) < 2:
        return None
    figure, axis = new_axis()
    for name in dict.fromkeys(series(row) for row, _ in measured):
        line = [(row, look) for row, look in measured if series(row) == name]
        if line[0][0].norm in GROUPLESS:
            _draw_level(axis, line[0][0], line[0][1], mode, sizes)
        else:
            _draw_line(axis, sorted(line, key=lambda pair: pair[0].statistics), mode)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    count_percent(axis)
    axis.set(xlabel="images of a statistics group, s", ylabel="test top-1 in %")
    words = f"Accuracy by the size of statistics groups, {MODES[mode]}: {_ends(rows, mode)}."
    return to_picture(figure, f"{mode}-sizes", MODES[mode].capitalize(), words)


def _draw_line(axis: Any, line: Sequence[tuple[Row, Look]], mode: str) -> None:
    sizes, means, deviations = [], [], []
    for row, _ in line:
        sizes.append(row.statistics)
        means.append(100 * row.top1[mode].mean)
        deviations.append(0 if math.isnan(row.top1[mode].sd) else 100 * row.top1[mode].sd)
    axis.errorbar(sizes, means, yerr=deviations, capsize=4, **line[0][1].style(linestyle="-"))


def _draw_level(axis: Any, row: Row, look: Look, mode: str, sizes: Sequence[int]) -> None:
    """Draw a norm that looks at no statistics groups: the same at every size."""
    mean, sd = 100 * row.top1[mode].mean, 100 * row.top1[mode].sd
    axis.plot(sizes, [mean] * len(sizes), **look.style(linestyle="--", linewidth=1, alpha=0.9))
    if not math.isnan(sd):
        axis.fill_between(sizes, mean - sd, mean + sd, color=look.color, alpha=0.1, linewidth=0)


def draw_differences(rows: Sequence[Row], comparisons: Sequence[Comparison], mode: str) -> Picture | None:
    """Draw the difference of each row to the reference with its interval; None where there is none."""
    looks = {row.label: look for row, look in zip(rows, give_looks(rows), strict=True)}
    ours = [comparison for comparison in comparisons if comparison.mode == mode]
    if not ours:
        return None
    figure, axis = new_axis(height=1.1 + 0.24 * len(ours))
    axis.axvspan(-_EQUAL, _EQUAL, facecolor="none", edgecolor="0.75", hatch="////", linewidth=0)
    axis.axvline(0, color="black", linewidth=1)
    for height, comparison in enumerate(ours):
        middle, style = 100 * comparison.difference, looks[comparison.row].style(linestyle="none")
        ends = comparison.interval or (math.nan, math.nan)
        bars = [[max(0, middle - 100 * ends[0])], [max(0, 100 * ends[1] - middle)]]
        axis.errorbar([middle], [height], xerr=None if comparison.interval is None else bars, capsize=3, **style)
    axis.set_yticks(range(len(ours)), [plain(comparison.row) for comparison in ours])
    axis.set_ylim(len(ours) - 0.5, -0.5)
    references = " or ".join(dict.fromkeys(comparison.reference for comparison in ours))
    axis.set_xlabel(plain(f"points of top-1 above {references}"))
    numbers = "; ".join(f"{comparison.row} {100 * comparison.difference:+z.2f}" for comparison in ours)
    words = f"Points of top-1 above {references}, {MODES[mode]}, with 95 % intervals: {numbers}."
    return to_picture(figure, f"{mode}-differences", MODES[mode].capitalize(), words)


def _ends(rows: Sequence[Row], mode: str) -> str:
    return "; ".join(f"{row.label} {100 * row.top1[mode].mean:.2f} %" for row in rows if mode in row.top1)
