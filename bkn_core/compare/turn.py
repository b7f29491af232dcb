"""One cell's turn: its run is trained, or what is left of it, and whatever goes wrong becomes the cell's own."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bkn_core.compare.cells import Cell, CellEnded, CellMoved, CellStarted, failed_cell, finished_cell
from bkn_core.compare.plan import Planned
from bkn_core.engine.events import Event, Started, Stepped
from bkn_core.engine.locks import alone_in
from bkn_core.engine.loop import train
from bkn_core.engine.run_folder import RunFolder
from bkn_core.errors import BknError, InputError, InterruptedRun, OutputError, StatisticsError
from bkn_core.recipe import Recipe

OnEvent = Callable[[Event | CellStarted | CellMoved | CellEnded], None]
GO_ON = "Give the same command again to go on."


@dataclasses.dataclass(frozen=True)
class Turn:
    """A cell of a matrix and its number there, from 1."""

    index: int
    total: int
    planned: Planned
    path: Path

    def started(self, *, reused: bool) -> CellStarted:
        """Return the event of its beginning."""
        recipe = self.planned.recipe
        place = (recipe.norm.kind, recipe.batch.statistics, recipe.train.seed)
        return CellStarted(self.index, self.total, *place, reused, self.planned.more)

    def failed(self, error: BknError) -> Cell:
        """Return its cell with an error in it; a damaged file in its folder needs no more than to be removed."""
        if isinstance(error, InputError) and f"{self.path}{os.sep}" in error.message:
            error = InputError(error.message, f"Remove {self.path}, and the same command trains it again.")
        return failed_cell(self.path, self.planned.recipe, error, self.planned.names)

    def finished(self) -> Cell:
        """Return its cell, read from its folder."""
        return finished_cell(RunFolder(self.path), self.planned.recipe, self.planned.names)


def in_turn(turns: Sequence[Turn], on_event: OnEvent, should_stop: Callable[[], bool]) -> Iterator[tuple[Turn, Cell]]:
    """Run cells one after the other in this process.

    Raises:
        InterruptedRun: `should_stop` said so; the run is saved.
    """
    for turn in turns:
        on_event(turn.started(reused=False))
        yield turn, run_cell(turn, on_event, should_stop)


def run_cell(turn: Turn, on_event: OnEvent, should_stop: Callable[[], bool]) -> Cell:
    """Train one cell, or what is left of it.

    Raises:
        InterruptedRun: `should_stop` said so; the run is saved.
    """
    steps = 1

    def tell(event: Event) -> None:
        nonlocal steps
        on_event(event)
        if isinstance(event, Started):
            steps = event.steps
        elif isinstance(event, Stepped):
            on_event(CellMoved(turn.index, turn.total, event.step / steps))

    try:
        _train_measurable(turn.planned.recipe, turn.path, tell, should_stop)
        return turn.finished()
    except InterruptedRun as error:
        message = f"{turn.path.name}: {error.message}"
        raise InterruptedRun(message, GO_ON, exit_code=error.exit_code) from error
    except BknError as error:
        return turn.failed(error)


def _train_measurable(
    recipe: Recipe, path: Path, on_event: Callable[[Event], None], should_stop: Callable[[], bool]
) -> None:
    """Train a run; where measuring by each image's own statistics has too few values, without that measure."""
    try:
        _train(recipe, path, on_event, should_stop)
    except StatisticsError:
        if recipe.eval.stats != "both":
            raise
        alone = recipe.eval.model_copy(update={"stats": "population"})
        _remove(path)
        _train(recipe.model_copy(update={"eval": alone}), path, on_event, should_stop)


def _train(recipe: Recipe, path: Path, on_event: Callable[[Event], None], should_stop: Callable[[], bool]) -> None:
    """Resume the run of a folder where it saved a state, and begin it anew where it did not."""
    folder = RunFolder(path)
    if folder.state.is_file():
        train(folder.recipe, resume=path, on_event=on_event, should_stop=should_stop)
    else:
        _remove(path)
        train(recipe, out=path, on_event=on_event, should_stop=should_stop)


def _remove(path: Path) -> None:
    try:
        if path.exists():
            with alone_in(path):  # nobody trains in there
                pass
            shutil.rmtree(path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be removed: {error}", "Remove it, or use another folder with --out."
        ) from error
