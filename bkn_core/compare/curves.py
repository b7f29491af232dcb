"""The picture of a comparison: accuracy over the epochs, one line for each row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bkn_core.compare.cells import Cell
from bkn_core.compare.histories import Point, common_points, history, measured_on
from bkn_core.compare.looks import Look, give_looks
from bkn_core.compare.rows import Row
from bkn_core.engine.files import replacing
from bkn_core.engine.plots import count_epochs, count_percent, new_figure, plain

_TITLES = {"population": "By population statistics", "batch": "Each image by its own statistics"}


def draw_curves(path: Path, rows: Sequence[Row], cells: Sequence[Cell]) -> None:
    """Draw top-1 over the epochs: the mean over seeds, in a band from the worst to the best.

    A run that did not finish is drawn thin by itself as far as it came, ends in a cross, and is named in the legend.

    Raises:
        OutputError: the file could not be written.
    """
    modes = [mode for mode in _TITLES if any(mode in row.top1 for row in rows)] or ["population"]
    figure = new_figure(figsize=(4.6 * len(modes) + 2.2, 4.2), layout="constrained")
    axes = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    looks = give_looks(rows)
    for axis, mode in zip(axes, modes, strict=True):
        for row, look in zip(rows, looks, strict=True):
            draw_row(axis, common_points(row, cells, mode), "epoch", look, plain(row.label))
            for cell in cells:
                if row.holds(cell) and cell.status != "finished" and cell.chosen:
                    draw_unfinished(axis, history(cell, mode), "epoch", look, plain(f"{row.label}: {_ends(row)}"))
        if not any(len(line.get_xdata()) for line in axis.get_lines()):
            axis.set_ylim(0, 100)
            axis.text(0.5, 0.5, "no run finished an epoch", transform=axis.transAxes, ha="center", color="gray")
        axis.set(title=_TITLES[mode])
        count_epochs(axis)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    count_percent(axes[0])  # which they share
    axes[0].set_ylabel(f"{measured_on(cells)} top-1 in %")
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    if lines:
        title = "mean of seeds, band\nfrom worst to best" if any(row.n > 1 for row in rows) else None
        figure.legend(
            handles=list(lines.values()),
            title=title,
            loc="outside right upper",
            frameon=False,
            handlelength=3.2,
            title_fontsize=9,
            alignment="left",
        )
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=150)


def draw_row(axis: Any, points: Sequence[tuple[Point, ...]], over: str, look: Look, label: str) -> None:
    """Draw the mean of the seeds over "epoch", "step" or "seconds", in a band from the worst to the best."""
    if not points:
        return
    places = [sum(getattr(point, over) for point in together) / len(together) for together in points]
    values = [[point.top1 for point in together] for together in points]
    # A marker on each of many epochs would hide the line.
    style = look.style(markersize=4, markevery=max(1, len(points) // 10))
    axis.plot(places, [sum(top1) / len(top1) for top1 in values], label=label, **style)
    if any(len(top1) > 1 for top1 in values):
        lowest, highest = [min(top1) for top1 in values], [max(top1) for top1 in values]
        axis.fill_between(places, lowest, highest, color=look.color, alpha=0.1, linewidth=0)


def draw_unfinished(axis: Any, points: Sequence[Point], over: str, look: Look, label: str) -> None:
    """Draw a run as far as it came, thin and with a cross at its end."""
    style = look.style(marker="x", markersize=8, markeredgewidth=2, linewidth=1)
    places, values = [getattr(point, over) for point in points], [point.top1 for point in points]
    axis.plot(places, values, label=label, markevery=[-1] if points else None, **style)


def _ends(row: Row) -> str:
    return ", ".join(f"{count} {status}" for status, count in row.unfinished.items())
