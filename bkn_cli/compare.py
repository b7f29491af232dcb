"""`bkn compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bkn_cli.options import Json, Verbose, split_words
from bkn_cli.render import reporting

if TYPE_CHECKING:
    from rich.table import Table


def compare(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE | RUN...] [KEY=VALUE]...",
            help="A recipe to run with every norm, size and seed (default digits_micro), or finished runs to set "
            "side by side; then any recipe key with another value.",
            show_default=False,
        ),
    ] = None,
    norms: Annotated[str, typer.Option(help="Norms, with commas: bkn,bn,brn,gn,ln,in,fixed,none.")] = "bn,bkn",
    statistics_batch_sizes: Annotated[
        str | None,
        typer.Option(help="Images per statistics group, with commas; default 2 and the recipe's gradient batch size."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with seeds that follow the recipe's.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder of all runs, table and picture; the same command again goes on there.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]|mps", help="Where to compute.")] = "",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compare norms and statistics batch sizes over seeds, run after run, with their spread.

    Examples: bkn compare --norms bn,bkn,gn --seeds 3 · bkn compare runs/A runs/B
    """
    with reporting("compare", as_json=as_json, verbose=verbose) as reporter:
        import bkn_core
        from bkn_cli.progress import TrainingProgress

        names, overrides = split_words(words)
        flags = [f"train.device={device}"] if device else []
        with TrainingProgress(reporter) as progress:
            result = bkn_core.compare(
                _source(names),
                [*overrides, *flags],
                norms=_listed(norms),
                statistics_batch_sizes=None if statistics_batch_sizes is None else _numbers(statistics_batch_sizes),
                seeds=seeds,
                out=out,
                on_event=progress,
                should_stop=reporter.should_stop,
            )
        for text in result.warnings:
            reporter.warn(text)
        reporter.table(_table(result))
        reporter.say(f"table, picture and numbers: {result.out}")
        document = result.to_dict()
        reporter.finish(document, {name: str(path) for name, path in result.artifacts.items()})


def _source(names: list[str]) -> Any:
    """Tell finished runs from a recipe: a run is a folder."""
    if not names:
        return None
    paths = [Path(name) for name in names]
    if len(names) == 1 and not paths[0].is_dir():
        return names[0]
    return paths


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

    table = Table(title="top-1 in %, mean ± sd over seeds", title_justify="left")
    modes = list(dict.fromkeys(mode for row in result.summary for mode in row.top1))
    for name in ("norm", "s", "runs", *modes, "images/s"):
        table.add_column(name, justify="left" if name == "norm" else "right")
    for row in result.summary:
        cells = []
        for mode in modes:
            measured = row.top1.get(mode)
            cells.append("" if measured is None else _spread(measured))
        table.add_row(row.norm, str(row.statistics), str(row.n), *cells, f"{row.images_per_second:.0f}")
    return table


def _spread(measured: Any) -> str:
    mean = f"{100 * measured.mean:.2f}"
    return mean if measured.sd is None else f"{mean} ± {100 * measured.sd:.2f}"
