"""`bkn train`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bkn_cli.options import Device, Json, Verbose, Words, split_words
from bkn_cli.render import Reporter, reporting

if TYPE_CHECKING:
    from bkn_core import Recipe


def train(
    words: Words = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; default runs/RECIPE-NORM-gG-sS-seedN.")] = None,
    resume: Annotated[Path | None, typer.Option(help="The folder of an interrupted run to continue.")] = None,
    device: Device = "",
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine, one GPU each.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build the model, say what would run, and stop.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a network as a recipe says.

    Without arguments it trains on scikit-learn's digits, offline, in less than a minute on two cores.

    Examples: bkn train · bkn train cifar10_resnet_micro data.root=cifar10.zip · bkn train --resume runs/NAME
    """
    with reporting("train", as_json=as_json, verbose=verbose) as reporter:
        if nproc > 1 and "WORLD_SIZE" not in os.environ:
            _spawn(nproc)
        recipe = _recipe(reporter, words, resume, device)
        if dry_run:
            _describe(reporter, recipe)
        else:
            _run(reporter, recipe, out, resume)


def _recipe(reporter: Reporter, words: list[str] | None, resume: Path | None, device: str) -> Recipe:
    from bkn_core import load_recipe
    from bkn_core.errors import RecipeError

    names, overrides = split_words(words)
    if len(names) > 1:
        raise RecipeError(f"{names[1]!r} is neither a recipe nor KEY=VALUE", "Name one recipe, then KEY=VALUE words.")
    flags = [f"train.device={device}"] if device else []
    if resume is None:
        return load_recipe(names[0] if names else None, [*overrides, *flags])
    if names or overrides:
        raise RecipeError(
            f"--resume takes the recipe of the run, so {(names + overrides)[0]!r} does not fit",
            "Resume without it, or train anew with it.",
        )
    from bkn_core.engine.run_folder import RunFolder

    return load_recipe(RunFolder.open(resume).path / "config.yaml", flags)


def _run(reporter: Reporter, recipe: Recipe, out: Path | None, resume: Path | None) -> None:
    import bkn_core
    from bkn_cli.progress import TrainingProgress
    from bkn_cli.render import metrics_result, metrics_table

    main_process = os.environ.get("RANK", "0") == "0"
    with TrainingProgress(reporter) as progress:
        result = bkn_core.train(recipe, out=out, resume=resume, on_event=progress, should_stop=reporter.should_stop)
    if not main_process:
        return
    reporter.table(metrics_table(f"{result.run}", result.metrics))
    best = f"best epoch {result.best_epoch}: top-1 {100 * result.best_top1:.2f} %"
    reporter.text(f"{result.steps} steps in {result.seconds:.1f} s, {result.images_per_second:.0f} images/s; {best}")
    reporter.say(f"next: bkn eval {result.run}   ·   bkn export model.onnx --run {result.run}")
    files = {
        "weights": result.run / "checkpoints" / "best.safetensors",
        "metrics": result.run / "metrics.csv",
        "predictions": result.run / "predictions.npz",
        **({"curves": result.run / "plots" / "curves.png"} if recipe.log.plots else {}),
    }
    details = {
        "run": str(result.run),
        "steps": result.steps,
        "seconds": result.seconds,
        "images_per_second": result.images_per_second,
        "best_top1": result.best_top1,
        "best_epoch": result.best_epoch,
    }
    reporter.finish({**metrics_result(result.metrics), **details}, {name: str(path) for name, path in files.items()})


def _describe(reporter: Reporter, recipe: Recipe) -> None:
    """Print what a run would do: sizes, steps and the conversion report."""
    import bkn_core
    from bkn_core.engine.build import load_splits
    from bkn_core.engine.device import choose_device
    from bkn_core.engine.models import count_parameters
    from bkn_core.engine.run_folder import run_name

    choose_device(recipe.train.device)
    splits = load_splits(recipe)
    model = bkn_core.build_model(recipe, splits.preprocess, len(splits.classes))
    steps = -(-len(splits.train) // recipe.batch.gradient) * recipe.train.epochs
    facts: dict[str, Any] = {
        "run": run_name(recipe),
        "train_images": len(splits.train),
        "test_images": len(splits.test),
        "classes": len(splits.classes),
        "parameters": count_parameters(model),
        "steps": steps,
    }
    layers = bkn_core.conversion_report(model) if recipe.norm.kind == "bkn" else []
    for name, value in facts.items():
        reporter.text(f"{name.replace('_', ' ')}: {value}")
    reporter.table(_layers(layers))
    rows = [{"name": r.name, "channels": r.channels, "prior": r.prior, "reason": r.reason} for r in layers]
    reporter.finish({**facts, "layers": rows, "recipe": recipe.model_dump(mode="json")}, {})


def _layers(layers: list[Any]) -> Any:
    from rich.table import Table

    known = sum(layer.prior is not None for layer in layers)
    table = Table(title=f"{known} of {len(layers)} normalization layers have a prior", title_justify="left")
    table.add_column("layer")
    table.add_column("channels", justify="right")
    table.add_column("prior, or why there is none", overflow="fold")
    for layer in layers:
        table.add_row(layer.name, str(layer.channels), layer.prior or f"none: {layer.reason}")
    return table


def _spawn(processes: int) -> None:
    """Run the same command in several processes under torchrun."""
    from torch.distributed.run import main as torchrun

    torchrun(["--standalone", f"--nproc-per-node={processes}", "-m", "bkn_cli.app", *sys.argv[1:]])
    raise typer.Exit(0)
