"""`bkn compare`."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
            help="Recipes to run with every norm, size and seed, default digits_micro, and any of their keys with "
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
    gradient_batch_sizes: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Images per optimizer step, with commas; default the recipe's."),
    ] = None,
    lr: Annotated[
        str | None,
        typer.Option(
            metavar="X,...",
            help="Learning rates, with commas; each row takes the best on validation images, of which a tenth of the "
            "training images are held out where the recipe has none.",
        ),
    ] = None,
    models: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Networks, with commas; default the recipe's.")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Runs of each, with seeds from the recipe's upwards; default 1."),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            metavar="X",
            help="Top-1 in % to which steps and seconds are counted; default the reference's best epoch.",
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            min=1, max=64, metavar="N", show_default=False, help="Runs at a time, which share the cores; default 1."
        ),
    ] = 1,
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
    """Compare norms, batch sizes, models and recipes over seeds, with spread, tests, costs and the best learning rate.

    What no option says the recipe's section `compare` does (`bkn keys compare`); a word such as model.name=... goes
    before it.

    A comparison that was interrupted goes on when the same command is given again. Where a run fails, the others go
    on, and the exit code is 6 if one diverged, else that of the first error, such as 2 for groups too small for a
    norm, 3 for missing data or 1 for a process that was killed.

    Examples:
      bkn compare
      bkn compare --norms bn,bkn,gn --seeds 3 --jobs 2
      bkn compare cifar10_resnet_micro --statistics-batch-sizes 1,2,128
      bkn compare --norms bn,bkn --lr 0.05,0.1,0.2 --gradient-batch-sizes 32,128
      bkn compare paper_cifar10_short data.root=cifar-10-batches-py --jobs 2
      bkn compare digits_micro mine.yaml --models cifar_resnet8,cifar_resnet20
      bkn compare photos data.image_size=32 --norms bkn,bn,gn --target 90
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
        lists = {
            "norms": _listed(norms),
            "statistics_batch_sizes": _numbers("--statistics-batch-sizes", statistics_batch_sizes, int),
            "gradient_batch_sizes": _numbers("--gradient-batch-sizes", gradient_batch_sizes, int),
            "learning_rates": _numbers("--lr", lr, float),
            "models": _listed(models),
        }
        # What was asked for; the library knows the defaults of the rest.
        matrix: dict[str, Any] = {name: value for name, value in {**lists, "seeds": seeds}.items() if value is not None}
        overrides += [] if device is None else [f"train.device={device}"]
        if isinstance(source, list) and isinstance(source[0], Path):
            _refuse_matrix(matrix)
        matrix |= {} if jobs == 1 else {"jobs": jobs}
        matrix |= {} if target is None else {"target": target / 100}
        with TrainingProgress(reporter, jobs=jobs) as progress:
            result = bkn_core.compare(
                source, overrides, **matrix, out=out, on_event=progress, should_stop=reporter.should_stop
            )
        for text in result.warnings:
            reporter.warn(text)
        reporter.text("top-1 in %, mean ± standard deviation over seeds:")
        reporter.table(_table(result))
        for text in _findings(result):
            reporter.text(text)
        reporter.say(f"report: {result.artifacts['page']}")
        artifacts = {name: str(path) for name, path in result.artifacts.items()}
        reporter.finish(result.to_dict(), artifacts, _failure(result))


def _source(names: list[str]) -> str | list[str] | list[Path] | None:
    """Tell finished runs, which are folders, from recipes."""
    from bkn_core.recipe import shipped_recipes

    if not names:
        return None
    is_run = [Path(name).is_dir() for name in names]
    is_recipe = [name in shipped_recipes() or Path(name).suffix in (".yaml", ".yml") for name in names]
    if len(names) == 1 and not is_run[0]:
        return names[0]
    return names if any(is_recipe) and not any(is_run) else [Path(name) for name in names]


def _refuse_matrix(matrix: dict[str, Any]) -> None:
    from bkn_core.errors import RecipeError

    if matrix:
        option = next(iter(matrix)).replace("learning_rates", "lr").replace("_", "-")
        raise RecipeError(f"finished runs take no --{option}", "Leave it out, or give one recipe in place of the runs.")


def _failure(result: Any) -> BknError | None:
    """Return the error of a comparison in which runs did not come to their end: a divergence before all others."""
    from bkn_core.compare.cells import cell_error

    failed = [cell for cell in result.cells if cell.status != "finished"]
    if not failed:
        return None
    first = next((cell for cell in failed if cell.status == "diverged"), failed[0])
    error = cell_error(first)
    error.message = (
        f"{len(failed)} of {len(result.cells)} runs did not finish, such as {first.run.name}: {first.message}"
    )
    error.hint = f"The rest is compared; see {result.artifacts['table']}."
    return error


def _findings(result: Any) -> Iterator[str]:
    """Say how the rows stand to their reference, and where a learning rate lies at the edge of those tried."""
    for one in result.comparisons:
        tost = one.equivalence
        shown = tost is not None and tost.equivalent
        within = f"; within half a point of it (TOST p {tost.p:.2g} over {tost.over})" if shown else ""
        difference = f"{100 * one.difference:+z.2f} points by {one.mode} statistics"
        yield f"{one.row} against {one.reference}: {difference}{within}"
    for row in result.summary:
        if row.edge:
            yield f"{row.label}: lr {row.learning_rate:g} is the {row.edge} tried; a better one may lie beyond"


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _numbers(option: str, text: str | None, kind: type[int] | type[float]) -> list[Any] | None:
    from bkn_core.errors import RecipeError

    try:
        return None if text is None else [kind(part) for part in _listed(text) or ()]
    except ValueError as error:
        numbers = "whole numbers with commas, such as 2,128" if kind is int else "numbers with commas, such as 0.05,0.1"
        raise RecipeError(f"{option} is {text!r}", f"Give {numbers}.") from error


def _table(result: Any) -> Table:
    from rich.table import Table

    table = Table()
    modes = list(dict.fromkeys(mode for row in result.summary for mode in row.top1))
    shown = [name for name in ("recipe", "model") if any(getattr(row, name) for row in result.summary)]
    shown += ["g"] if len({row.gradient for row in result.summary}) > 1 else []
    rates = ["lr"] if any(row.rates for row in result.summary) else []
    for name in ("norm", "s", *shown, *rates, "runs", *modes, "images/s"):
        table.add_column(name, justify="left" if name in ("norm", "recipe", "model") else "right")
    for row in result.summary:
        norm = f"{row.norm} ({row.variant})" if row.variant else row.norm
        spreads = [_spread(row.top1[mode]) if mode in row.top1 else "" for mode in modes]
        more = [str(row.gradient) if name == "g" else getattr(row, name) for name in shown]
        more += [f"{row.learning_rate:g}"] if rates else []
        table.add_row(norm, str(row.statistics), *more, row.finished, *spreads, _speed(row.images_per_second))
    return table


def _spread(measured: Any) -> str:
    mean = f"{100 * measured.mean:.2f}"
    return mean if math.isnan(measured.sd) else f"{mean} ± {100 * measured.sd:.2f}"


def _speed(images_per_second: float) -> str:
    return "" if math.isnan(images_per_second) else f"{images_per_second:.0f}"
