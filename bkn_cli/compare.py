"""`bkn compare`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bkn_cli.completion import complete_norms, complete_word
from bkn_cli.options import Device, Json, Verbose, data_words, path, split_words
from bkn_cli.reporting import reporting

if TYPE_CHECKING:
    from rich.table import Table

    from bkn_core.errors import BknError


def compare(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE|RUN|KEY=VALUE",
            help="A recipe to run with every norm, size and seed, default digits_micro, and any of its keys with "
            "another value (`bkn keys` lists them); or finished runs to set side by side.",
            show_default=False,
            autocompletion=complete_word,
        ),
    ] = None,
    norms: Annotated[
        str | None,
        typer.Option(
            metavar="NORM,...",
            help="Any of bkn, bn, brn, gn, ln, in, none and those of docs/rivals.md, with commas; default bn,bkn.",
            autocompletion=complete_norms,
        ),
    ] = None,
    statistics_batch_sizes: Annotated[
        str | None,
        typer.Option(
            metavar="N,...", help="Images per statistics group, with commas; default 2 and the recipe's batch.gradient."
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Runs of each, with seeds from the recipe's upwards; default 1."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=path, metavar="DIR", help="Folder of all runs and the report; the same command again goes on there."
        ),
    ] = None,
    device: Device = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compare norms and statistics batch sizes over seeds, run after run, with their spread.

    A comparison that was interrupted goes on when the same command is given again. Where a run diverged, or has
    groups too small for its norm, the others are compared and the exit code is 6 or 2.

    Examples:
      bkn compare
      bkn compare --norms bn,bkn,gn --seeds 3
      bkn compare cifar10_resnet_micro --statistics-batch-sizes 1,2,128
      bkn compare photos data.image_size=32 --norms bkn,bn,gn
      bkn compare runs/A runs/B
    """
    with reporting("compare", as_json=as_json, verbose=verbose) as reporter:
        reporter.load_library()
        import bkn_core
        from bkn_cli.progress import TrainingProgress

        names, overrides = split_words(words)
        if not any((Path(name) / "config.yaml").is_file() for name in names):
            names, data = data_words(names)
            overrides = [*data, *overrides]
        source = _source(names)
        matrix = _matrix(norms, statistics_batch_sizes, seeds)
        overrides += [] if device is None else [f"train.device={device}"]
        if isinstance(source, list):
            _refuse_matrix(matrix)
        with TrainingProgress(reporter) as progress:
            result = bkn_core.compare(
                source, overrides, **matrix, out=out, on_event=progress, should_stop=reporter.should_stop
            )
        for text in result.warnings:
            reporter.warn(text)
        reporter.text("top-1 in %, mean ± standard deviation over seeds:")
        reporter.table(_table(result))
        reporter.say(f"report: {result.artifacts['page']}")
        artifacts = {name: str(path) for name, path in result.artifacts.items()}
        reporter.finish(result.to_dict(), artifacts, _failure(result))


def _source(names: list[str]) -> str | list[Path] | None:
    """Tell finished runs from a recipe: a run is a folder."""
    if not names:
        return None
    paths = [Path(name) for name in names]
    return paths if len(names) > 1 or paths[0].is_dir() else names[0]


def _matrix(norms: str | None, statistics_batch_sizes: str | None, seeds: int | None) -> dict[str, Any]:
    """Return what was asked for; the library knows the defaults of the rest."""
    asked = {
        "norms": None if norms is None else _listed(norms),
        "statistics_batch_sizes": None if statistics_batch_sizes is None else _numbers(statistics_batch_sizes),
        "seeds": seeds,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _refuse_matrix(matrix: dict[str, Any]) -> None:
    from bkn_core.errors import RecipeError

    if matrix:
        option = next(iter(matrix)).replace("_", "-")
        raise RecipeError(f"finished runs take no --{option}", "Leave it out, or give one recipe in place of the runs.")


def _failure(result: Any) -> BknError | None:
    """Return the error of a comparison in which runs did not come to their end."""
    from bkn_core.errors import DivergedError, StatisticsError

    failed = [cell for cell in result.cells if cell.status != "finished"]
    if not failed:
        return None
    first = next((cell for cell in failed if cell.status == "diverged"), failed[0])
    kind = DivergedError if first.status == "diverged" else StatisticsError
    return kind(
        f"{len(failed)} of {len(result.cells)} runs did not finish, such as {first.run.name}: {first.message}",
        f"The rest is compared; see {result.artifacts['table']}.",
    )


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    from bkn_core.errors import RecipeError

    try:
        return [int(part) for part in _listed(text)]
    except ValueError as error:
        raise RecipeError(
            f"--statistics-batch-sizes is {text!r}", "Give whole numbers with commas, such as 2,128."
        ) from error


def _table(result: Any) -> Table:
    from rich.table import Table

    table = Table()
    modes = list(dict.fromkeys(mode for row in result.summary for mode in row.top1))
    for name in ("norm", "s", "runs", *modes, "images/s"):
        table.add_column(name, justify="left" if name == "norm" else "right")
    for row in result.summary:
        norm = f"{row.norm} ({row.variant})" if row.variant else row.norm
        spreads = [_spread(row.top1[mode]) if mode in row.top1 else "" for mode in modes]
        table.add_row(norm, str(row.statistics), row.finished, *spreads, _speed(row.images_per_second))
    return table


def _spread(measured: Any) -> str:
    mean = f"{100 * measured.mean:.2f}"
    return mean if math.isnan(measured.sd) else f"{mean} ± {100 * measured.sd:.2f}"


def _speed(images_per_second: float) -> str:
    return "" if math.isnan(images_per_second) else f"{images_per_second:.0f}"
