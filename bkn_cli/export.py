"""`bkn export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bkn_cli.options import NO_VALUE, Json, Verbose, path
from bkn_cli.render import Reporter
from bkn_cli.reporting import reporting


def export(
    output: Annotated[Path, typer.Argument(parser=path, metavar="OUTPUT.onnx", help="The file to write.")],
    run: Annotated[
        Path | None,
        typer.Option(
            parser=path, metavar="DIR", help="A run folder or checkpoint; default the newest finished run under runs/."
        ),
    ] = None,
    stats: Annotated[
        Literal["population", "batch"],
        typer.Option(metavar="KIND", help="population: constants per channel. batch: each image by itself."),
    ] = "population",
    fold: Annotated[
        Literal["affine", "conv"],
        typer.Option(metavar="PLACE", help="affine: a Mul and an Add per layer. conv: inside the convolutions."),
    ] = "affine",
    precision: Annotated[
        Literal["fp32", "fp16"], typer.Option(metavar="TYPE", help="fp32, or fp16 with float32 input and output.")
    ] = "fp32",
    opset: Annotated[int, typer.Option(metavar="N", help="ONNX operator set.")] = 18,
    device: Annotated[
        str,
        typer.Option(metavar="DEVICE", help="Where ONNX Runtime runs the parity check: cpu, cuda, cuda:N or auto."),
    ] = "cpu",
    benchmark: Annotated[
        bool, typer.Option("--benchmark", metavar=NO_VALUE, help="Measure the file's latency.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a trained model as an ONNX file, once it was run and agreed with the model.

    Of a run folder it takes the weights of the last epoch.

    Examples:
      bkn export model.onnx
      bkn export model.onnx --run runs/NAME --fold conv
      bkn export batch.onnx --stats batch
    """
    with reporting("export", as_json=as_json, verbose=verbose) as reporter:
        reporter.load_library()
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
        if result.stats != stats:
            reporter.warn("the layers of this model normalize in one way only, which the file holds")
        if result.latency is not None:
            _show_latency(reporter, result.latency)
        reporter.say(f"next: bkn eval {shlex.quote(str(result.path))}")
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


def _show_latency(reporter: Reporter, latency: dict[str, Any]) -> None:
    for name, times in latency.items():
        if name.startswith("batch_"):
            reporter.text(
                f"latency at batch {name.removeprefix('batch_')}: median {times['p50_ms']:.2f} ms, "
                f"90th percentile {times['p90_ms']:.2f} ms over {latency['runs']} runs ({latency['provider']})"
            )
