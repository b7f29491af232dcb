"""`bkn train`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bkn_cli.light import recipes_alone
from bkn_cli.options import NO_VALUE, Device, Json, Verbose, Words, data_words, path, split_words
from bkn_cli.render import Reporter, metrics_result, metrics_table
from bkn_cli.reporting import reporting

if TYPE_CHECKING:
    from rich.table import Table

    from bkn_core import Recipe


def train(
    words: Words = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=path, metavar="DIR", help="The run folder; default runs/RECIPE-DATA-MODEL-NORM-gG-sS-seedN."
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(parser=path, metavar="DIR", help="Continue the interrupted run of this folder.")
    ] = None,
    device: Device = None,
    nproc: Annotated[int, typer.Option(min=1, metavar="N", help="Processes on this machine, one GPU each.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar=NO_VALUE, help="Build the model, say what would run, and stop.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", metavar=NO_VALUE, help="Print the whole recipe as YAML, and stop.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a network as a recipe says.

    Without a recipe it trains on scikit-learn's digits, offline, in about a minute on two cores.

    Examples:
      bkn train
      bkn train norm.kind=bn batch.statistics=2
      bkn train cifar10_resnet_micro data.root=cifar10.zip
      bkn train photos data.image_size=64
      bkn train --resume runs/NAME
      bkn train --resume runs/NAME data.root=/where/they/lie/now
      bkn train norm.kind=bn --print-config > mine.yaml

    `bkn keys` lists what a recipe and KEY=VALUE can say.
    """
    with reporting("train", as_json=as_json, verbose=verbose) as reporter:
        if print_config:
            _print_config(reporter, words, out, resume, device)
            return
        from bkn_cli.processes import follow_starter, run_processes

        if nproc > 1 and not dry_run and "WORLD_SIZE" not in os.environ:
            run_processes(reporter, nproc)
        follow_starter()
        reporter.load_library()
        recipe = _recipe(words, out, resume, device)
        if dry_run:
            _describe(reporter, recipe)
        else:
            _run(reporter, recipe, out, resume)


def _print_config(
    reporter: Reporter, words: list[str] | None, out: Path | None, resume: Path | None, device: str | None
) -> None:
    with recipes_alone():
        from bkn_core.recipe import dump_recipe

        recipe = _recipe(words, out, resume, device)
        reporter.text(dump_recipe(recipe).rstrip())
        reporter.finish({"recipe": recipe.model_dump(mode="json")}, {})


def _recipe(words: list[str] | None, out: Path | None, resume: Path | None, device: str | None) -> Recipe:
    from bkn_core.errors import RecipeError
    from bkn_core.recipe import load_recipe

    names, overrides = split_words(words)
    names, data = data_words(names)
    overrides = [*data, *overrides]
    if len(data) > 1:
        raise RecipeError(f"{data[1]!r} is a second place of data", "Name one folder, zip or .npz file.")
    if len(names) > 1:
        raise RecipeError(f"{names[1]!r} is neither a recipe nor KEY=VALUE", "Name one recipe, then KEY=VALUE words.")
    flags = [] if device is None else [f"train.device={device}"]
    if resume is None:
        return load_recipe(names[0] if names else None, [*overrides, *flags])
    others = [*names, *([] if out is None else [f"--out {out}"])]
    if others:
        raise RecipeError(
            f"--resume takes recipe and folder of the run, so {others[0]!r} does not fit",
            "Resume without it, or train anew with it; data.root, eval.*, log.*, train.device, workers, patience or "
            "more train.epochs fit.",
        )
    from bkn_core.engine.run_folder import RunFolder

    return load_recipe(RunFolder.open(resume).path / "config.yaml", [*overrides, *flags])


def _run(reporter: Reporter, recipe: Recipe, out: Path | None, resume: Path | None) -> None:
    import bkn_core
    from bkn_cli.progress import TrainingProgress
    from bkn_core.engine.distributed import process_place

    with TrainingProgress(reporter) as progress:
        result = bkn_core.train(recipe, out=out, resume=resume, on_event=progress, should_stop=reporter.should_stop)
    if process_place()[1] != 0:
        return
    reporter.text(f"{result.run}, last epoch{' on the test images' if result.validated else ''}:")
    reporter.table(metrics_table(result.metrics))
    figure = f"validation {result.word} {100 * result.best:.2f} %"
    best = f"; best epoch {result.best_epoch}: {figure}" if result.validated else ""
    reporter.text(f"{result.steps} steps in {result.seconds:.1f} s, {result.images_per_second:.0f} images/s{best}")
    place = shlex.quote(str(result.run))
    export = f"\n      bkn export model.onnx --run {place}" if recipe.task == "classification" else ""
    reporter.say(f"next: bkn eval {place}{export}")
    files = {
        "weights": result.run / "checkpoints" / "last.safetensors",  # what the metrics were measured on
        "best_weights": result.run / "checkpoints" / "best.safetensors",
        "metrics": result.run / "metrics.csv",
        "predictions": result.run / "predictions.npz",
        **({"curves": result.run / "plots" / "curves.png"} if recipe.log.plots else {}),
    }
    details = {
        "run": str(result.run),
        "steps": result.steps,
        "seconds": result.seconds,
        "images_per_second": result.images_per_second,
        f"best_{result.figure}": result.best,
        "best_epoch": result.best_epoch,
    }
    reporter.finish({**metrics_result(result.metrics), **details}, {name: str(path) for name, path in files.items()})


def _describe(reporter: Reporter, recipe: Recipe) -> None:
    """Print what a run would do: sizes, steps and the conversion report."""
    import bkn_core
    from bkn_core.engine.build import load_splits
    from bkn_core.engine.device import choose_device
    from bkn_core.engine.models import count_parameters
    from bkn_core.engine.priors import initial_priors
    from bkn_core.engine.run_folder import run_name
    from bkn_core.engine.tensorboard import check_tensorboard

    check_tensorboard(recipe)
    device = choose_device(recipe.train.device)
    splits = load_splits(recipe)
    for text in splits.notes:
        reporter.warn(text)
    model = bkn_core.build_model(recipe, splits.preprocess, len(splits.classes), pretrained=False)
    steps = -(-len(splits.train) // recipe.batch.gradient) * recipe.train.epochs
    facts: dict[str, Any] = {
        "run": run_name(recipe),
        "train_images": len(splits.train),
        **({} if splits.validation is None else {"validation_images": len(splits.validation)}),
        "test_images": len(splits.test),
        "classes": len(splits.classes),
        "parameters": count_parameters(model),
        "steps": steps,
        "device": str(device),
        "input_size": " x ".join(map(str, (len(splits.preprocess.mean), *splits.preprocess.image_size))),
        "learning_rate": recipe.optim.lr,
        "schedule": recipe.optim.schedule,
    }
    layers = bkn_core.conversion_report(model) if recipe.norm.kind == "bkn" else []
    initial = {row.name: row for row in initial_priors(recipe, splits)}
    for name, value in facts.items():
        reporter.text(f"{name.replace('_', ' ')}: {value}")
    if layers:
        known = sum(layer.prior is not None for layer in layers)
        reporter.text(f"norm layers with a prior: {known} of {len(layers)}")
        reporter.table(_layers(layers, initial))
    rows = [{"name": r.name, "channels": r.channels, "prior": r.prior, "reason": r.reason} for r in layers]
    priors = {"initial_priors": [row.summary() for row in initial.values()]}
    reporter.finish({**facts, "layers": rows, **priors, "recipe": recipe.model_dump(mode="json")}, {})


def _layers(layers: list[Any], initial: dict[str, Any]) -> Table:
    from rich.table import Table

    caption = "log(v/v'): observed over predicted variance before training, mean ± deviation over channels"
    table = Table(caption=caption if initial else None, caption_justify="left")
    table.add_column("layer")
    table.add_column("channels", justify="right")
    if initial:
        table.add_column("log(v/v')", justify="right", no_wrap=True)
    table.add_column("prior, or why there is none", overflow="fold")
    for layer in layers:
        error = initial[layer.name].refined if initial else None
        ratio = f"{error.log_variance_ratio:+z.2f} ± {error.spread:.2f}" if error else ""
        numbers = [str(layer.channels), *([ratio] if initial else [])]
        table.add_row(layer.name, *numbers, layer.prior or f"none: {layer.reason}")
    return table
