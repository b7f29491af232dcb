"""`bkn eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from bkn_cli.options import Device, Json, Verbose, split_words
from bkn_cli.render import metrics_result, metrics_table, reporting


def evaluate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TARGET] [data.KEY=VALUE]...",
            help="A run folder, a .safetensors checkpoint or an .onnx file; default the newest finished run under "
            "runs/. Then other test images than the recipe's, such as data.root=photos.zip.",
            show_default=False,
        ),
    ] = None,
    stats: Annotated[
        str | None,
        typer.Option(
            metavar="population|batch|both",
            help="Normalize by the population, or each image by itself and the priors; default the recipe's.",
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per forward pass.")] = None,
    device: Device = "auto",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure a trained model on test images, with PyTorch or ONNX Runtime.

    Examples: bkn eval · bkn eval runs/NAME --stats both · bkn eval model.onnx
    """
    with reporting("eval", as_json=as_json, verbose=verbose) as reporter:
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
        reporter.table(metrics_table(f"{result.target} ({result.provider})", result.metrics))
        reporter.say(f"every image's prediction: {result.predictions}")
        details = {"target": str(result.target), "provider": result.provider}
        reporter.finish({**metrics_result(result.metrics), **details}, {"predictions": str(result.predictions)})
