"""The comparison itself: the runs of a matrix, or finished runs read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bkn_core.compare.axes import plan_matrix
from bkn_core.compare.cells import Cell, CellEnded, cell_error, flat_keys
from bkn_core.compare.jobs import side_by_side
from bkn_core.compare.plan import Planned, plan_cells
from bkn_core.compare.report import CompareResult, publish, with_page
from bkn_core.compare.runs import read_runs, refuse_masks
from bkn_core.compare.turn import OnEvent, Turn, in_turn
from bkn_core.engine.build import load_splits
from bkn_core.engine.fingerprint import check_data, fingerprint
from bkn_core.engine.locks import alone_in
from bkn_core.engine.run_folder import RunFolder, numbered_folder, subject
from bkn_core.errors import BknError, InputError, InterruptedRun, RecipeError
from bkn_core.recipe import Recipe, shipped_recipes
from bkn_core.recipe_sections import LogConfig

Source = str | Path | Recipe
# Errors of training itself: they are results. Where nothing but others came, nothing could be run.
_RESULTS = ("diverged", "statistics", "worker")


def compare(
    source: Source | Sequence[Source] | None = None,
    overrides: Sequence[str] = (),
    *,
    norms: Sequence[str] | None = None,
    statistics_batch_sizes: Sequence[int] | None = None,
    gradient_batch_sizes: Sequence[int] | None = None,
    learning_rates: Sequence[float] | None = None,
    models: Sequence[str] | None = None,
    seeds: int | Sequence[int] | None = None,
    target: float | None = None,
    jobs: int = 1,
    out: Path | str | None = None,
    on_event: OnEvent = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> CompareResult:
    """Compare normalizations: train a matrix of norms, sizes, rates, models and seeds, or read finished runs.

    The same call again goes on where the last one stopped. The report is written anew after every run. Of several
    learning rates each row takes the best by validation images, a tenth of the training images where there are none;
    no test image is looked at for it.

    Args:
        source: a recipe (its path, name or value, or None for the default one), several, or folders of finished runs.
        overrides: KEY=VALUE words for the recipes.
        norms: kinds of normalization. Of these and all up to `seeds`, None is what the recipe's section `compare` says.
        statistics_batch_sizes: images per statistics group.
        gradient_batch_sizes: images per optimizer step.
        learning_rates: to choose from.
        models: names of networks.
        seeds: the seeds, or how many from the recipe's own one upwards.
        target: top-1 of an epoch, a fraction, to which steps and seconds are counted; None is the best epoch of the
            reference of the same seed.
        jobs: runs at a time, each in a process of its own with its share of the threads where they are several.
        out: folder of the report and of the runs, default `runs/compare-<recipe>-<data>-<model>`; for finished runs a
            new one, `runs/compare-finished`.
        on_event: called with `CellStarted`, `CellMoved` and `CellEnded` of every run, and without `jobs` with the
            events of the run itself.
        should_stop: asked after every step; true saves and ends the comparison.

    Returns:
        The cells, their summary and comparisons, and the files written. A run that failed is a cell with its error.

    Raises:
        InterruptedRun: `should_stop` said so.
        RecipeError: the recipe or the matrix does not fit, or `out` holds runs of another recipe.
        InputError: a run that is to be read is missing or not finished, a finished cell was trained on other data, or
            finished runs are to be compared in a folder that holds a comparison.
        BusyError: another process works in `out`.
        BknError: a fault of the first run, where not one could be run.
    """
    out = None if out is None else Path(out)
    sources = [source] if source is None or isinstance(source, (str, Path, Recipe)) else list(source)
    if not (source is None or isinstance(source, (str, Path, Recipe)) or any(map(_is_recipe, sources))):
        return _compare_runs([Path(str(run)) for run in sources], overrides, out, target)
    asked = {
        "norms": norms,
        "statistics_batch_sizes": statistics_batch_sizes,
        "gradient_batch_sizes": gradient_batch_sizes,
        "learning_rates": learning_rates,
        "models": models,
        "seeds": seeds,
    }
    recipes, notes = plan_matrix(sources, overrides, asked)
    refuse_masks(recipes)
    out = Path("runs") / f"compare-{_name(recipes)}" if out is None else out
    with alone_in(out):
        matrix = _Matrix(plan_cells(recipes), out, notes, target)
        return matrix.run(jobs, on_event, should_stop)


def _is_recipe(source: object) -> bool:
    """Tell a recipe from the folder of a run."""
    return isinstance(source, Recipe) or source in shipped_recipes() or Path(str(source)).suffix in (".yaml", ".yml")


def _name(recipes: Sequence[Recipe]) -> str:
    names = [*dict.fromkeys(recipe.name for recipe in recipes)]
    return subject(recipes[0]) if len(names) == 1 else "-".join(names)[:100]


class _Matrix:
    """The cells of a matrix, run or found, and the report of them.

    Args:
        planned: the cells.
        out: folder of all.
        notes: what the report is to say.
        target: see `compare`.

    Raises:
        RecipeError: a folder holds a run of another recipe.
    """

    def __init__(self, planned: Sequence[Planned], out: Path, notes: Sequence[str], target: float | None) -> None:
        self.out, self.notes, self.target = out, notes, target
        self.turns = [Turn(i, len(planned), cell, out / "cells" / cell.name) for i, cell in enumerate(planned, 1)]
        self.cells: dict[int, Cell] = {}
        for turn in self.turns:
            _check_unchanged(turn.planned.recipe, turn.path)

    def run(self, jobs: int, on_event: OnEvent, should_stop: Callable[[], bool]) -> CompareResult:
        """Take the finished cells, then run the others."""
        finished = [turn for turn in self.turns if _is_finished(turn.path)]
        for turn, cell in _found(finished):
            on_event(turn.started(reused=True))
            self.cells[turn.index] = cell
            on_event(CellEnded(turn.index, turn.total, cell, True))
        waiting = [turn for turn in self.turns if turn not in finished]
        run = (
            side_by_side(waiting, jobs, on_event, should_stop) if jobs > 1 else in_turn(waiting, on_event, should_stop)
        )
        try:
            for turn, cell in run:
                self.cells[turn.index] = cell
                if len(self.cells) < len(self.turns):
                    self._publish()
                on_event(CellEnded(turn.index, turn.total, cell, False))
        except InterruptedRun:
            if self.cells:
                with_page(self._publish(), measure=False, trusted=True)
            raise
        cells = [*self.cells.values()]
        if all(cell.status == "failed" and cell.code not in _RESULTS for cell in cells):
            raise cell_error(cells[0])
        return with_page(self._publish(), measure=True, trusted=True)

    def _publish(self) -> CompareResult:
        return publish(self.out, [self.cells[index] for index in sorted(self.cells)], self.notes, target=self.target)


def _is_finished(path: Path) -> bool:
    try:
        return RunFolder(path).status == "finished"
    except InputError:  # its state tells, where there is one
        return False


def _found(turns: Sequence[Turn]) -> Iterator[tuple[Turn, Cell]]:
    """Yield the cells of finished runs; those that are damaged, or of other data than is there now, have failed."""
    known: dict[tuple[object, str], dict[str, Any]] = {}
    for turn in turns:
        try:
            folder = RunFolder(turn.path)
            _ = folder.recipe  # what cannot be read may be another than the cell's
            cell = turn.finished()
            _check_data(turn, folder.data, known)
        except BknError as error:
            cell = turn.failed(error)
        yield turn, cell


def _check_data(turn: Turn, saved: dict[str, Any] | None, known: dict[tuple[object, str], dict[str, Any]]) -> None:
    """Refuse a finished cell that was trained on other data than is there now; one that is resumed finds out itself.

    Raises:
        InputError: saying what changed.
    """
    recipe = turn.planned.recipe
    if saved is None:
        return
    key = (recipe.data, recipe.model.name)
    if key not in known:
        known[key] = fingerprint(load_splits(recipe))
    try:
        check_data(saved, known[key])
    except InputError as error:
        hint = "Put the data back as it was, or use another folder with --out."
        raise InputError(f"{turn.path}: {error.message}", hint) from error


def _compare_runs(
    runs: Sequence[Path], overrides: Sequence[str], out: Path | None, target: float | None
) -> CompareResult:
    if overrides:
        raise RecipeError(f"finished runs take no KEY=VALUE words, but there is {overrides[0]!r}", "Leave them out.")
    if out is not None and (out / "compare.json").exists():
        raise InputError(f"{out} holds a comparison already", "Name another folder with --out.")
    cells, warnings = read_runs(runs)
    out = numbered_folder(Path("runs") / "compare-finished") if out is None else out
    return with_page(publish(out, cells, warnings, target=target), measure=True, trusted=False)


# A run that could be measured in one way only has another eval.stats than was asked for; the others change no result.
_FREE = {"eval.stats", "train.device", "train.workers", "data.download", "data.root"} | {
    f"log.{key}" for key in LogConfig.model_fields
}


def _check_unchanged(recipe: Recipe, path: Path) -> None:
    """Refuse a cell that was trained, or begun, by another recipe.

    Raises:
        RecipeError: naming the keys that differ.
    """
    try:
        there, wanted = flat_keys(RunFolder(path).recipe), flat_keys(recipe)
    except InputError:  # there is none, or its cell says that it is damaged
        return
    changed = [key for key in wanted if there[key] != wanted[key] and key not in _FREE]
    if changed:
        differences = ", ".join(f"{key} ({there[key]} there, {wanted[key]} wanted)" for key in changed)
        raise RecipeError(f"{path} holds a run of another recipe: {differences}", "Use another folder with --out.")
