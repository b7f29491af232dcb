"""Pictures of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from typing import TYPE_CHECKING, Any

from bkn_core.engine.files import replacing
from bkn_core.engine.run_folder import RunFolder
from bkn_core.engine.tasks.named import task_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NORM_COLORS = {
    "bkn": "tab:blue",
    "bn": "tab:red",
    "brn": "tab:orange",
    "gn": "tab:green",
    "ln": "tab:purple",
    "in": "tab:brown",
    "none": "tab:gray",
    "fixed": "tab:olive",
    "reference": "tab:olive",
    "frozen": "darkkhaki",
    "gn_ws": "limegreen",
    "gkn": "darkgreen",
    "mabn": "tab:pink",
    "online": "tab:cyan",
    "cbn": "gold",
    "frn": "indigo",
    "evonorm": "violet",
    "iternorm": "navy",
    "normprop": "black",
}
"""The colour of each norm, the same in every picture."""

NORM_MARKERS = {
    "bkn": "o",
    "bn": "s",
    "brn": "D",
    "gn": "^",
    "ln": "v",
    "in": ">",
    "none": "h",
    "fixed": "<",
    "reference": "<",
    "frozen": "d",
    "gn_ws": "p",
    "gkn": "*",
    "mabn": "P",
    "online": "8",
    "cbn": "H",
    "frn": "+",
    "evonorm": "1",
    "iternorm": "2",
    "normprop": "3",
}
"""The marker of each norm, which tells them apart in print without colour."""

_LINES = {"population": "-", "batch": "--"}
_IMAGES = {"": "test", "validation_": "validation"}  # what a run's epochs were measured on, one of them


_MARKED = 30  # a line of more points has no markers


def new_figure(**options: Any) -> Figure:
    """Return an empty figure to draw into a file, whatever MPLBACKEND says of screens."""
    if "matplotlib" not in sys.modules and "MPLBACKEND" in os.environ:
        _import_with(os.environ.pop("MPLBACKEND"))
    from matplotlib.figure import Figure

    return Figure(**options)


def _import_with(backend: str) -> None:
    """Import matplotlib, which with a backend that it does not know refuses even to be imported."""
    import matplotlib

    os.environ["MPLBACKEND"] = backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = backend


def plain(text: str) -> str:
    """Return a text as labels of a picture show it letter by letter, where matplotlib looks for formulas."""
    return text.encode(errors="replace").decode().replace("$", r"\$")


def count_epochs(axis: Any) -> None:
    """Give an axis over epochs whole numbers for ticks, also where there is but one epoch."""
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.5), max(high, 1.5))


def count_percent(axis: Any) -> None:
    """Give an axis over which percentages are drawn ticks from 0 to 100 alone, and equal ones space around them."""
    low, high = axis.get_ylim()
    if high - low < 1:
        low, high = low - 5, high + 5
        axis.set_ylim(low, high)
    axis.set_yticks([tick for tick in axis.get_yticks() if max(low, 0) <= tick <= min(high, 100)])


def plot_curves(folder: RunFolder) -> None:
    """Draw loss, the figure that decides and gain into plots/curves.png, in the colour of the run's norm.

    Raises:
        OutputError: the file could not be written.
    """
    task = task_of(folder.recipe)
    rows, color = folder.records(), NORM_COLORS[folder.recipe.norm.kind]
    steps = [row for row in rows if row["kind"] == "step"]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    has_gain = any(row.get("gain") is not None for row in steps)
    figure = new_figure(figsize=(5 * (3 if has_gain else 2), 3.8), layout="constrained")
    axes = figure.subplots(1, 3 if has_gain else 2)
    _line(axes[0], steps, "loss", "training loss", color="black", alpha=0.5)
    for (kind, line), (prefix, images) in itertools.product(_LINES.items(), _IMAGES.items()):
        style: dict[str, Any] = {"linestyle": line, "color": color}
        _line(axes[0], epochs, f"{prefix}{kind}_loss", f"{images} loss, {kind} statistics", **style)
        words = f"{images}, {kind} statistics"
        _line(axes[1], epochs, f"{prefix}{kind}_{task.figure}", words, over="epoch", factor=100, **style)
    axes[0].set(xlabel="step", ylabel="cross entropy", title="Loss")
    axes[1].set(ylabel=f"{task.word} in %", title="Accuracy")
    count_epochs(axes[1])
    count_percent(axes[1])
    if has_gain:
        _line(axes[2], steps, "gain", "mean Kalman gain", color=color)
        axes[2].set(xlabel="step", ylabel="gain q", title="Weight of the observation", ylim=(0, None))
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(plain(folder.path.name), fontsize=10)
    with replacing(folder.path / "plots" / "curves.png") as aside:
        figure.savefig(aside, format="png", dpi=120)


def _line(
    axis: Any, rows: list[dict[str, Any]], key: str, label: str, *, over: str = "step", factor: float = 1, **style: Any
) -> None:
    points = [(row[over], factor * row[key]) for row in rows if row.get(key) is not None]
    if points:
        marker = "o" if len(points) <= _MARKED else ""  # a single point has no line
        axis.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4, **style)
