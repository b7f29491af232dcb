"""What can be watched while a run goes on: its metrics, and the table, picture and events that are made of them."""

from __future__ import annotations

import math
import time
from typing import Any

from bkn_core.engine.plots import plot_curves
from bkn_core.engine.run_folder import RunFolder
from bkn_core.engine.tensorboard import EventFile
from bkn_core.recipe import Recipe

_DRAWING_SECONDS = 5.0  # epochs shorter than this are not drawn one by one


class MetricsLog:
    """The metrics of a run: each row at once in metrics.jsonl, the rest made anew at the end of an epoch.

    Args:
        folder: the run.
        recipe: says whether there are a picture and events.

    Raises:
        OutputError: a file cannot be written.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe) -> None:
        self.folder, self.has_picture = folder, recipe.log.plots
        self.events = EventFile(folder) if recipe.log.tensorboard else None
        self.drawn = -math.inf

    def add(self, row: dict[str, Any]) -> None:
        """Record a row."""
        self.folder.record(row)
        if self.events is not None:
            self.events.add(row)

    def flush(self) -> None:
        """Let readers see all rows."""
        if self.events is not None:
            self.events.flush()

    def publish(self, *, is_last: bool) -> None:
        """Write metrics.csv and flush the events; draw the curves too, unless that was done a moment ago."""
        self.flush()
        self.folder.write_table()
        if self.has_picture and (is_last or time.monotonic() - self.drawn > _DRAWING_SECONDS):
            plot_curves(self.folder)
            self.drawn = time.monotonic()

    def close(self) -> None:
        """Close the events."""
        if self.events is not None:
            self.events.close()
