"""`bkn eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bkn_cli.options import DEVICES, NO_VALUE, Json, Verbose, split_words
from bkn_cli.render import Reporter, metrics_result, metrics_table
from bkn_cli.reporting import reporting

if TYPE_CHECKING:
    from rich.table import Table

_CLASSES = 20  # that are shown
_WIDE = 120  # columns that hold a layer's prior beside its numbers


def evaluate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGET|data.KEY=VALUE",
            help="A run folder, a .safetensors checkpoint or an .onnx file, default the newest finished run under "
            "runs/; then other test images than the recipe's, such as data.root=photos.zip.",
            show_default=False,
        ),
    ] = None,
    stats: Annotated[
        Literal["population", "batch", "both", "mixtures"] | None,
        typer.Option(
            metavar="KIND",
            help="population, batch (each image by itself), both, or mixtures: the mean and the variance each of the "
            "population or of a group of batch.statistics test images, as training normalizes one (bn by its own "
            "moments, bkn by the blend with the prior, with the gain of the end). Default the recipe's, for a file its "
            "own.",
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, metavar="N", help="Images per forward pass.")] = None,
    priors: Annotated[
        bool,
        typer.Option(
            "--priors", metavar=NO_VALUE, help="Compare each layer's prior with what it sees; a table and a picture."
        ),
    ] = False,
    device: Annotated[str, typer.Option(metavar="DEVICE", help=f"Where to compute: {DEVICES}.")] = "auto",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure a trained model on test images, with PyTorch or ONNX Runtime.

    Of a run folder it measures the weights of the last epoch.

    Examples:
      bkn eval
      bkn eval runs/NAME --stats both
      bkn eval runs/NAME --stats mixtures
      bkn eval runs/NAME --priors
      bkn eval model.onnx
      bkn eval model.onnx data.name=imagefolder data.root=photos.zip
    """
    with reporting("eval", as_json=as_json, verbose=verbose) as reporter:
        reporter.load_library()
        import bkn_core
        from bkn_core.errors import RecipeError

        names, overrides = split_words(words)
        if len(names) > 1:
            raise RecipeError(f"{names[1]!r} is a second target", "Measure one at a time.")
        result = bkn_core.evaluate(
            names[0] if names else None,
            stats=stats,
            batch_size=batch_size,
            device=device,
            overrides=overrides,
            priors=priors,
        )
        for text in result.warnings:
            reporter.warn(text)
        reporter.text(f"{result.target} ({result.provider}):")
        reporter.text(f"test images: {result.data}")
        reporter.table(metrics_table(result.metrics, group=result.statistics_batch_size))
        _show_classes(reporter, result)
        details: dict[str, Any] = {"target": str(result.target), "provider": result.provider, "data": result.data}
        if result.statistics_batch_size is not None:
            details["statistics_batch_size"] = result.statistics_batch_size
        details["classes"], class_files = _classes_result(result.classes)
        files = {"predictions": str(result.predictions), **class_files}
        if result.priors is not None:
            reporter.text(f"priors against what the layers read, by {result.priors.statistics} statistics:")
            is_wide = reporter.output.width >= _WIDE
            reporter.table(_priors(result.priors, is_wide=is_wide))
            if not is_wide:
                reporter.text("\n".join(["what predicts each layer:", *_told(result.priors)]))
            if any(row.gain for row in result.priors.rows):
                reporter.table(_gains(result.priors))
            files |= {name: str(path) for name, path in result.priors.files.items()}
            reporter.say(f"in numbers and drawn: {files['priors']}, {files['priors_plot']}")
            details["priors"] = result.priors.summary()
        reporter.finish({**metrics_result(result.metrics), **details}, files)


def _show_classes(reporter: Reporter, result: Any) -> None:
    for report in result.classes.values():
        reporter.table(_classes(report))
    reporter.say(f"every image's prediction: {result.predictions}")
    for report in result.classes.values():
        reporter.say("each class: {classes}, {confusion}, {confusion_plot}".format(**report.files))


def _classes_result(reports: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """Return the classes for JSON and their files: of one kind of statistics by themselves, of both by kind."""
    first, *others = reports
    files = {name: str(path) for name, path in reports[first].files.items()}
    files |= {f"{kind}_{name}": str(path) for kind in others for name, path in reports[kind].files.items()}
    summaries = {kind: report.summary() for kind, report in reports.items()}
    return summaries if others else summaries[first], files


def _classes(report: Any) -> Table:
    """Lay out precision and recall of the classes, of many those of least recall."""
    from rich.table import Table
    from rich.text import Text

    from bkn_core.recipe_words import printable

    worst = sorted(report.rows, key=lambda row: 2.0 if row.recall is None else row.recall)[:_CLASSES]
    rows = report.rows if len(report.rows) <= _CLASSES else worst
    left_out = f"; of least recall, all in {report.files['classes']}" if len(rows) < len(report.rows) else ""
    table = Table(caption=f"by {report.statistics} statistics{left_out}", caption_justify="left")
    for name in ("class", "precision %", "recall %", report.unit):
        table.add_column(name, justify="left" if name == "class" else "right")
    for row in rows:
        shares = ("" if share is None else f"{100 * share:.2f}" for share in (row.precision, row.recall))
        table.add_row(Text(printable(row.name)), *shares, str(row.support))
    return table


def _priors(report: Any, *, is_wide: bool) -> Table:
    """Lay out the quality of priors, one line a layer; on a narrow terminal without the priors' own words."""
    from rich.table import Table

    table = Table(
        caption="v, v': observed and predicted variance, mean ± deviation over channels; 0 is right. analytic: "
        "log(v/v') without correction and innovation. local: the same from measured moments of the preceding layers.",
        caption_justify="left",
        expand=is_wide,
    )
    table.add_column("layer", no_wrap=True)
    for name in ("|µ'-µ|/σ", "log(v/v')", "analytic", "local"):
        table.add_column(name, justify="right", no_wrap=True)
    if is_wide:
        table.add_column("prior, or why there is none", ratio=1, no_wrap=True, overflow="ellipsis")
    for row in report.rows:
        table.add_row(row.name, *_numbers(row), *([_prior(row)] if is_wide else []))
    return table


def _told(report: Any) -> list[str]:
    return [f"  {row.name}: {_prior(row)}" for row in report.rows]


def _prior(row: Any) -> str:
    return str(row.prior) if row.refined else f"none: {row.reason}"


def _gains(report: Any) -> Table:
    """Lay out what the layers knew of their priors' errors when training ended, one line a layer."""
    from rich.table import Table

    table = Table(
        caption="P: variance of the prior's error. R: of an observation's noise. q = P / (P + R), each of mean and "
        "variance, when training ended; used: the gain that the layer blends by, schedule included.",
        caption_justify="left",
    )
    table.add_column("layer", no_wrap=True)
    for name in ("P", "R", "q", "used"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        if row.gain is not None:
            pairs = [", ".join(f"{value:.3f}" for value in pair) for pair in (row.gain.error, row.gain.noise)]
            implied = ", ".join(f"{value:.2f}" for value in row.gain.implied)
            table.add_row(row.name, *pairs, implied, f"{row.gain.used:.2f}")
    return table


def _numbers(row: Any) -> tuple[str, ...]:
    if row.refined is None:
        return "", "", "", ""
    used = f"{row.refined.log_variance_ratio:+z.2f} ± {row.refined.spread:.2f}"
    others = (f"{error.log_variance_ratio:+z.2f}" for error in (row.analytic, row.local))
    return f"{row.refined.mean_error:.3f}", used, *others
