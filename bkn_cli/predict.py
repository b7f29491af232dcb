"""`bkn predict`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bkn_cli.options import DEVICES, Json, Verbose, path
from bkn_cli.reporting import reporting

if TYPE_CHECKING:
    from rich.table import Table

    from bkn_cli.render import Reporter

_SHOWN = 50  # pictures of a table; a file holds all


def predict(
    target: Annotated[
        Path,
        typer.Argument(parser=path, metavar="TARGET", help="A run folder, a checkpoint or an .onnx file."),
    ],
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES...", help="Pictures, folders or zip files of them, patterns."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="Write all predictions to a .csv or .json file."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="How many of the likeliest classes to name.")] = 1,
    stats: Annotated[
        Literal["population", "batch"] | None,
        typer.Option(
            metavar="KIND",
            help="population, or batch (each image by itself). Default the recipe's, for a file its own.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images per forward pass.")] = 64,
    device: Annotated[str, typer.Option(metavar="DEVICE", help=f"Where to compute: {DEVICES}.")] = "auto",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say what pictures show: the likeliest class of each and its probability, with PyTorch or ONNX Runtime.

    Pictures are prepared as the model's own were: colour, size and normalization are part of it. Pictures that cannot
    be read are named, the others predicted; the exit code is 3 then.

    Examples:
      bkn predict runs/NAME photo.png
      bkn predict model.onnx photos/ --top 3 --out predictions.csv
    """
    with reporting("predict", as_json=as_json, verbose=verbose) as reporter:
        reporter.load_library()
        import bkn_core
        from bkn_core.errors import InputError
        from bkn_core.predict import check_format, row, save

        if out is not None:
            check_format(out)
        with _progress(reporter) as progress:
            result = bkn_core.predict(
                target, images, stats=stats, top=top, batch_size=batch_size, device=device, progress=progress
            )
        for text in result.warnings:
            reporter.warn(text)
        files = {}
        if out is not None:
            save(out, result)
            files["predictions"] = str(out)
        reporter.text(f"{result.target} ({result.provider}, {result.stats} statistics):")
        reporter.table(_table(result, whole=out is None))
        if out is not None:
            reporter.say(f"every picture's prediction: {out}")
        failure = None
        if result.unreadable:
            count, first = len(result.unreadable), result.unreadable[0]
            failure = InputError(
                f"{count} of {len(result.predictions)} pictures could not be read; the first: {first.error}",
                "Restore them or leave them out; the others are predicted.",
            )
        facts: dict[str, Any] = {"target": str(result.target), "provider": result.provider, "stats": result.stats}
        reporter.finish({**facts, "predictions": [row(one) for one in result.predictions]}, files, failure)


@contextlib.contextmanager
def _progress(reporter: Reporter) -> Iterator[Callable[[int, int], None]]:
    """Show how many pictures are done, and for how long it goes on, where there are more than one batch of them."""
    from rich.progress import Progress

    with Progress(console=reporter.human, transient=True) as bar:
        task = bar.add_task("pictures", visible=False)

        def tell(done: int, count: int) -> None:
            bar.update(task, completed=done, total=count, visible=done < count)

        yield tell


def _table(result: Any, *, whole: bool) -> Table:
    """Lay out predictions, one line a picture; of many the first where a file holds all."""
    from rich.table import Table
    from rich.text import Text

    from bkn_core.recipe_words import printable, printable_path

    rows = result.predictions if whole else result.predictions[:_SHOWN]
    left = len(result.predictions) - len(rows)
    table = Table(caption=f"and {left} more" if left else None, caption_justify="left")
    table.add_column("picture", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("%", justify="right", no_wrap=True)
    for one in rows:
        names = Text("\n".join(printable(name) for name, _ in one.top) or "cannot be read")
        shares = "\n".join(f"{100 * probability:.1f}" for _, probability in one.top)
        table.add_row(Text(printable_path(one.file)), names, shares)
    return table
