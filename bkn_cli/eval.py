"""`bkn eval`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from bkn_cli.options import DEVICES, Json, Verbose, split_words
from bkn_cli.render import metrics_result, metrics_table
from bkn_cli.reporting import reporting


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
        Literal["population", "batch", "both"] | None,
        typer.Option(
            metavar="KIND",
            help="population, batch (each image by itself) or both; default the recipe's, for a file its own.",
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, metavar="N", help="Images per forward pass.")] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help=f"Where to compute: {DEVICES}.")] = "auto",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure a trained model on test images, with PyTorch or ONNX Runtime.

    Of a run folder it measures the weights of the best epoch.

    Examples:
      bkn eval
      bkn eval runs/NAME --stats both
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
            names[0] if names else None, stats=stats, batch_size=batch_size, device=device, overrides=overrides
        )
        for text in result.warnings:
            reporter.warn(text)
        reporter.text(f"{result.target} ({result.provider}):")
        reporter.table(metrics_table(result.metrics))
        reporter.say(f"every image's prediction: {result.predictions}")
        details = {"target": str(result.target), "provider": result.provider}
        reporter.finish({**metrics_result(result.metrics), **details}, {"predictions": str(result.predictions)})
