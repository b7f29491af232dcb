"""`bkn export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bkn_cli.options import Json, Verbose
from bkn_cli.render import reporting


def export(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT.onnx", help="The file to write.")],
    run: Annotated[
        Path | None, typer.Option(help="A run folder or checkpoint; default the newest finished run under runs/.")
    ] = None,
    stats: Annotated[
        str,
        typer.Option(metavar="population|batch", help="Fold the population's statistics, or take each image's own."),
    ] = "population",
    fold: Annotated[
        str,
        typer.Option(
            metavar="affine|conv", help="Leave a Mul and an Add per layer, or merge them into the convolution."
        ),
    ] = "affine",
    precision: Annotated[str, typer.Option(metavar="fp32|fp16", help="Type of weights and activations.")] = "fp32",
    opset: Annotated[int, typer.Option(help="ONNX operator set.")] = 18,
    device: Annotated[
        str, typer.Option(metavar="cpu|auto|cuda[:N]", help="Where ONNX Runtime runs the parity check.")
    ] = "cpu",
    benchmark: Annotated[bool, typer.Option("--benchmark", help="Measure the file's latency.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a trained model as an ONNX file, and check it against the model before it appears.

    Examples: bkn export model.onnx · bkn export batch.onnx --stats batch · bkn export model.onnx --fold conv
    """
    with reporting("export", as_json=as_json, verbose=verbose) as reporter:
        import bkn_core

        result = bkn_core.export_onnx(
            output,
            run=run,
            stats=stats,
            fold=fold,
            precision=precision,
            opset=opset,
            benchmark=benchmark,
            device=device,
        )
        reporter.text(f"{result.path}: {result.nodes} nodes, opset {result.opset}, {result.precision}, {result.stats}")
        reporter.text(
            f"agrees with the unfolded model on {result.images} images: largest difference {result.max_abs:.2e}, "
            f"top-1 {100 * result.top1_agreement:.1f} % ({result.provider})"
        )
        for size, times in (result.latency or {}).items():
            reporter.text(f"latency, {size}: " + ", ".join(f"{name} {value:.2f} ms" for name, value in times.items()))
        reporter.say(f"next: bkn eval {result.path}")
        facts = {
            "path": str(result.path),
            "max_abs": result.max_abs,
            "top1_agreement": result.top1_agreement,
            "sha256": result.sha256,
            "images": result.images,
            "stats": result.stats,
            "fold": result.fold,
            "precision": result.precision,
            "opset": result.opset,
            "nodes": result.nodes,
            "provider": result.provider,
            "latency": result.latency,
        }
        reporter.finish(facts, {"onnx": str(result.path)})
