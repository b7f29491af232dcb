"""The comparison itself: runs of a matrix one after the other, or finished runs read."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from bkn_core.compare.cells import (
    Cell,
    CellEnded,
    CellStarted,
    cell_name,
    failed_cell,
    finished_cell,
    flat_keys,
)
from bkn_core.compare.plan import plan_recipes, recipe_loader
from bkn_core.compare.report import CompareResult, publish, with_page
from bkn_core.compare.runs import read_runs
from bkn_core.engine.build import load_splits
from bkn_core.engine.events import Event
from bkn_core.engine.fingerprint import check_data, fingerprint
from bkn_core.engine.locks import alone_in
from bkn_core.engine.loop import train
from bkn_core.engine.run_folder import RunFolder, numbered_folder, subject
from bkn_core.errors import DivergedError, InputError, InterruptedRun, OutputError, RecipeError, StatisticsError
from bkn_core.recipe import Recipe
from bkn_core.recipe_sections import LogConfig

OnEvent = Callable[[Event | CellStarted | CellEnded], None]


def compare(
    source: str | Path | Recipe | Sequence[Path] | None = None,
    overrides: Sequence[str] = (),
    *,
    norms: Sequence[str] = ("bn", "bkn"),
    statistics_batch_sizes: Sequence[int] | None = None,
    seeds: int | Sequence[int] = 1,
    out: Path | str | None = None,
    on_event: OnEvent = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> CompareResult:
    """Compare normalizations: train a matrix of norms, statistics batch sizes and seeds, or read finished runs.

    The same call again goes on where the last one stopped. The report is written anew after every run.

    Args:
        source: a recipe (its path, name or value, or None for the default one), or the folders of finished runs.
        overrides: KEY=VALUE words for the recipe.
        norms: kinds of normalization.
        statistics_batch_sizes: images per statistics group; None is 2 and the recipe's `batch.gradient`.
        seeds: the seeds, or how many from the recipe's own one upwards.
        out: folder of the report and of the runs, default `runs/compare-<recipe>-<data>-<model>`; for finished runs a
            new one, `runs/compare-finished`.
        on_event: called with the events of every run, and with `CellStarted` and `CellEnded` around them.
        should_stop: asked after every step; true saves and ends the comparison.

    Returns:
        The cells, their summary and comparisons, and the files written. A run that diverged, or whose groups are
        too small for its norm, is a cell with that status.

    Raises:
        InterruptedRun: `should_stop` said so.
        RecipeError: the recipe or the matrix does not fit, or `out` holds runs of another recipe.
        InputError: a run that is to be read is missing or not finished, a finished cell was trained on other data, or
            finished runs are to be compared in a folder that holds a comparison.
        BusyError: another process works in `out`.
        BknError: any other fault of a run.
    """
    out = None if out is None else Path(out)
    if source is not None and not isinstance(source, (str, Path, Recipe)):
        return _compare_runs([Path(run) for run in source], overrides, out)
    load = recipe_loader(source, overrides)
    recipes = plan_recipes(load, norms=norms, statistics_batch_sizes=statistics_batch_sizes, seeds=seeds)
    out = Path("runs") / f"compare-{subject(recipes[0])}" if out is None else out
    with alone_in(out):
        return _run_matrix(recipes, out, on_event, should_stop)


def _run_matrix(
    recipes: Sequence[Recipe], out: Path, on_event: OnEvent, should_stop: Callable[[], bool]
) -> CompareResult:
    """Take or train every cell in turn."""
    matrix = [(recipe, out / "cells" / cell_name(recipe)) for recipe in recipes]
    for recipe, path in matrix:
        _check_unchanged(recipe, path)
    _check_data(matrix)
    cells: list[Cell] = []
    for index, (recipe, path) in enumerate(matrix, 1):
        reused = RunFolder(path).status == "finished"
        norm, statistics, seed = recipe.norm.kind, recipe.batch.statistics, recipe.train.seed
        on_event(CellStarted(index, len(matrix), norm, statistics, seed, reused))
        try:
            cell = finished_cell(RunFolder(path), recipe) if reused else _run(recipe, path, on_event, should_stop)
        except InterruptedRun:
            if cells:
                with_page(publish(out, cells), measure=False, trusted=True)
            raise
        cells.append(cell)
        if not reused or index == len(matrix):
            result = publish(out, cells)
        on_event(CellEnded(index, len(matrix), cell, reused))
    return with_page(result, measure=True, trusted=True)


def _compare_runs(runs: Sequence[Path], overrides: Sequence[str], out: Path | None) -> CompareResult:
    if overrides:
        raise RecipeError(f"finished runs take no KEY=VALUE words, but there is {overrides[0]!r}", "Leave them out.")
    if out is not None and (out / "compare.json").exists():
        raise InputError(f"{out} holds a comparison already", "Name another folder with --out.")
    cells, warnings = read_runs(runs)
    out = numbered_folder(Path("runs") / "compare-finished") if out is None else out
    return with_page(publish(out, cells, warnings), measure=True, trusted=False)


# A run that could be measured in one way only has another eval.stats than was asked for; the others change no result.
_FREE = {"eval.stats", "train.device", "train.workers", "data.download", "data.root"} | {
    f"log.{key}" for key in LogConfig.model_fields
}


def _check_unchanged(recipe: Recipe, path: Path) -> None:
    """Refuse a cell that was trained, or begun, by another recipe.

    Raises:
        RecipeError: naming the keys that differ.
    """
    if not (path / "config.yaml").is_file():
        return
    there, wanted = flat_keys(RunFolder(path).recipe), flat_keys(recipe)
    changed = [key for key in wanted if there[key] != wanted[key] and key not in _FREE]
    if changed:
        differences = ", ".join(f"{key} ({there[key]} there, {wanted[key]} wanted)" for key in changed)
        raise RecipeError(f"{path} holds a run of another recipe: {differences}", "Use another folder with --out.")


def _check_data(matrix: Sequence[tuple[Recipe, Path]]) -> None:
    """Refuse finished cells that were trained on other data than is there now; one that is resumed finds out itself.

    Raises:
        InputError: naming the first such cell, and what changed.
    """
    finished = [(recipe, RunFolder(path)) for recipe, path in matrix if RunFolder(path).status == "finished"]
    known = [(recipe, folder.path, data) for recipe, folder in finished if (data := folder.data) is not None]
    if not known:
        return
    found = fingerprint(load_splits(known[0][0]))  # all cells have the same data
    for _, path, data in known:
        try:
            check_data(data, found)
        except InputError as error:
            hint = "Put the data back as it was, or use another folder with --out."
            raise InputError(f"{path}: {error.message}", hint) from error


def _run(recipe: Recipe, path: Path, on_event: OnEvent, should_stop: Callable[[], bool]) -> Cell:
    """Train one cell, or what is left of it."""
    try:
        try:
            _train(recipe, path, on_event, should_stop)
        except StatisticsError:
            if recipe.eval.stats != "both":
                raise
            # Perhaps only the measure by each image's own statistics has too few values.
            alone = recipe.eval.model_copy(update={"stats": "population"})
            _remove(path)
            _train(recipe.model_copy(update={"eval": alone}), path, on_event, should_stop)
    except StatisticsError as error:
        return failed_cell(path, recipe, "failed", error.message)
    except DivergedError as error:
        return failed_cell(path, recipe, "diverged", error.message)
    except InterruptedRun as error:
        raise InterruptedRun(
            f"{path.name}: {error.message}", "Give the same command again to go on.", exit_code=error.exit_code
        ) from error
    return finished_cell(RunFolder(path), recipe)


def _train(recipe: Recipe, path: Path, on_event: OnEvent, should_stop: Callable[[], bool]) -> None:
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
