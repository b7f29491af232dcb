"""The picture of a comparison: accuracy over the epochs, one line for each row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bkn_core.compare.cells import Cell
from bkn_core.compare.summary import Row
from bkn_core.engine.files import replacing
from bkn_core.engine.plots import NORM_COLORS, count_epochs, new_figure
from bkn_core.engine.run_folder import RunFolder

_STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))  # line and marker of each statistics batch size
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
    looks = _looks(rows)
    for axis, mode in zip(axes, modes, strict=True):
        for row, look in zip(rows, looks, strict=True):
            history = _history(row, cells, mode)
            if history:
                _draw_row(axis, history, row.label, look)
            for cell in cells:
                if row.holds(cell) and not cell.top1:
                    _draw_unfinished(axis, cell, mode, f"{row.label}: {_ends(row)}", look)
        if not any(len(line.get_xdata()) for line in axis.get_lines()):
            axis.set_ylim(0, 100)
            axis.text(0.5, 0.5, "no run finished an epoch", transform=axis.transAxes, ha="center", color="gray")
        axis.set(title=_TITLES[mode])
        count_epochs(axis)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"{_images(cells)} top-1 in %")
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


def _looks(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Give each statistics batch size a line, and the variants of a norm paler shades of its colour."""
    sizes = sorted({row.statistics for row in rows})
    looks = []
    for row in rows:
        variants = list(dict.fromkeys((r.gradient, r.variant) for r in rows if r.norm == row.norm))
        paleness = variants.index((row.gradient, row.variant)) / (len(variants) + 1)
        line, marker = _STYLES[sizes.index(row.statistics) % len(_STYLES)]
        looks.append({"color": _paler(NORM_COLORS[row.norm], paleness), "linestyle": line, "marker": marker})
    return looks


def _paler(color: str, share: float) -> tuple[float, ...]:
    """Mix a colour with a share of white."""
    from matplotlib.colors import to_rgb

    return tuple(part + share * (1 - part) for part in to_rgb(color))


def _ends(row: Row) -> str:
    return ", ".join(f"{count} {status}" for status, count in row.unfinished.items())


def _history(row: Row, cells: Sequence[Cell], mode: str) -> dict[int, list[float]]:
    """Return the top-1 in % of a row's finished cells, by each epoch that all of them have."""
    histories = []
    for cell in cells:
        if row.holds(cell) and mode in cell.top1:
            histories.append(_epochs(cell, mode))
    common = [epoch for epoch in (histories[0] if histories else ()) if all(epoch in other for other in histories)]
    return {epoch: [history[epoch] for history in histories] for epoch in common}


def _epochs(cell: Cell, mode: str) -> dict[int, float]:
    """Return the top-1 in % of each epoch, on the validation images where the run has some, else on the test images."""
    names = (f"validation_{mode}_top1", f"{mode}_top1")
    records = [record for record in RunFolder(cell.run).records() if record["kind"] == "epoch"]
    values = [(record["epoch"], next((record[name] for name in names if name in record), None)) for record in records]
    return {epoch: 100 * float(top1) for epoch, top1 in values if top1 is not None}


def _images(cells: Sequence[Cell]) -> str:
    """Name the images that the epochs of the finished cells were measured on."""
    rows = [RunFolder(cell.run).records() for cell in cells if cell.top1]
    held_out = {any(key.startswith("validation_") for record in records for key in record) for records in rows}
    return " or ".join(name for name, flag in (("test", False), ("validation", True)) if flag in held_out) or "test"


def _draw_row(axis: Any, history: dict[int, list[float]], label: str, look: dict[str, Any]) -> None:
    epochs, values = list(history), list(history.values())
    # A marker on each of many epochs would hide the line.
    style = {**look, "markersize": 4, "markevery": max(1, len(epochs) // 10)}
    axis.plot(epochs, [sum(top1) / len(top1) for top1 in values], label=label, **style)
    if any(len(top1) > 1 for top1 in values):
        lowest, highest = [min(top1) for top1 in values], [max(top1) for top1 in values]
        axis.fill_between(epochs, lowest, highest, color=look["color"], alpha=0.1, linewidth=0)


def _draw_unfinished(axis: Any, cell: Cell, mode: str, label: str, look: dict[str, Any]) -> None:
    history = _epochs(cell, mode)
    style = {**look, "marker": "x", "markersize": 8, "markeredgewidth": 2, "linewidth": 1}
    axis.plot(list(history), list(history.values()), label=label, markevery=[-1] if history else None, **style)
