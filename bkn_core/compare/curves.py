"""The picture of a comparison: test accuracy over the epochs, one line for each row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bkn_core.compare.cells import Cell
from bkn_core.compare.summary import Row
from bkn_core.engine.files import replacing
from bkn_core.engine.run_folder import RunFolder

_STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))  # line and marker of each statistics batch size
_TITLES = {"population": "By population statistics", "batch": "Each image by its own statistics"}


def draw_curves(path: Path, rows: Sequence[Row], cells: Sequence[Cell]) -> None:
    """Draw top-1 over the epochs: the mean over seeds, in a band from the worst to the best.

    Raises:
        OutputError: the file could not be written.
    """
    from matplotlib.figure import Figure

    modes = [mode for mode in _TITLES if any(mode in row.top1 for row in rows)] or ["population"]
    figure = Figure(figsize=(4.6 * len(modes) + 2.2, 4.2), layout="constrained")
    axes = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    looks = _looks(rows)
    for axis, mode in zip(axes, modes, strict=True):
        for row, look in zip(rows, looks, strict=True):
            _draw_row(axis, _history(row, cells, mode), row.label, look)
        axis.set(xlabel="epoch", title=_TITLES[mode])
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("test top-1 in %")
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    if lines:
        figure.legend(handles=list(lines.values()), loc="outside right upper", frameon=False, handlelength=3.2)
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=150)


def _looks(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Give each norm a colour and each statistics batch size a line; variants of one norm get colours of their own."""
    norms = list(dict.fromkeys((row.norm, row.gradient, row.variant) for row in rows))
    sizes = sorted({row.statistics for row in rows})
    looks = []
    for row in rows:
        colour = norms.index((row.norm, row.gradient, row.variant)) if len(norms) > 1 else sizes.index(row.statistics)
        line, marker = _STYLES[sizes.index(row.statistics) % len(_STYLES)]
        looks.append({"color": f"C{colour}", "linestyle": line, "marker": marker})
    return looks


def _history(row: Row, cells: Sequence[Cell], mode: str) -> NDArray[np.float64]:
    """Return the test top-1 in % of a row's finished cells by epoch, (seeds, epochs)."""
    histories = []
    for cell in cells:
        if row.holds(cell) and mode in cell.top1:
            epochs = [record for record in RunFolder(cell.run).records() if record["kind"] == "epoch"]
            histories.append([100 * record[f"{mode}_top1"] for record in epochs])
    return np.array(histories)


def _draw_row(axis: Any, history: NDArray[np.float64], label: str, look: dict[str, Any]) -> None:
    if not history.size:
        return
    epochs = np.arange(1, history.shape[1] + 1)
    # A marker on each of many epochs would hide the line.
    axis.plot(epochs, history.mean(0), label=label, markersize=4, markevery=max(1, len(epochs) // 10), **look)
    if len(history) > 1:
        axis.fill_between(epochs, history.min(0), history.max(0), color=look["color"], alpha=0.15, linewidth=0)
