"""Pictures of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from typing import TYPE_CHECKING, Any

from bkn_core.engine.files import replacing
from bkn_core.engine.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {"population": "tab:blue", "batch": "tab:orange"}
_IMAGES = {"": "test", "validation_": "validation"}  # what a run's epochs were measured on, one of them


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


def plot_curves(folder: RunFolder) -> None:
    """Draw loss, top-1 and gain over the steps into plots/curves.png.

    Raises:
        OutputError: the file could not be written.
    """
    rows = folder.records()
    steps = [row for row in rows if row["kind"] == "step"]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    has_gain = any(row.get("gain") is not None for row in steps)
    figure = new_figure(figsize=(5 * (3 if has_gain else 2), 3.8), layout="constrained")
    axes = figure.subplots(1, 3 if has_gain else 2)
    _line(axes[0], steps, "loss", "training loss", color="tab:gray")
    for (kind, color), (prefix, images) in itertools.product(_COLORS.items(), _IMAGES.items()):
        style: dict[str, Any] = {"marker": "o", "color": color}
        _line(axes[0], epochs, f"{prefix}{kind}_loss", f"{images} loss, {kind} statistics", **style)
        _line(axes[1], epochs, f"{prefix}{kind}_top1", f"{images}, {kind} statistics", factor=100, **style)
    axes[0].set(xlabel="step", ylabel="cross entropy", title="Loss")
    axes[1].set(xlabel="step", ylabel="top-1 in %", title="Accuracy")
    if has_gain:
        _line(axes[2], steps, "gain", "mean Kalman gain", color="tab:green")
        axes[2].set(xlabel="step", ylabel="gain q", title="Weight of the observation", ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(folder.path.name, fontsize=10)
    with replacing(folder.path / "plots" / "curves.png") as aside:
        figure.savefig(aside, format="png", dpi=120)


def _line(axis: Any, rows: list[dict[str, Any]], key: str, label: str, *, factor: float = 1, **style: Any) -> None:
    points = [(row["step"], factor * row[key]) for row in rows if row.get(key) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, **style)
