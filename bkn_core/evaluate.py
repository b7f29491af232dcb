"""The verb `evaluate`: measure a run, a checkpoint or an ONNX file on test images."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bkn_core.data.batches import normalize
from bkn_core.data.preprocess import Preprocess
from bkn_core.data.sources import composed
from bkn_core.data.splits import Images
from bkn_core.engine.checkpoint import find_run, load_weights, weights_path
from bkn_core.engine.classes import ClassReport, report_classes
from bkn_core.engine.device import choose_device
from bkn_core.engine.evaluation import MIXTURES, measure_model, modes, save_predictions
from bkn_core.engine.examples import draw_examples
from bkn_core.engine.priors import PriorReport, report_priors
from bkn_core.engine.run_folder import newest_run
from bkn_core.engine.tasks.classification import Classification
from bkn_core.engine.tasks.named import task_of
from bkn_core.engine.tasks.task import Measured, Task
from bkn_core.engine.trust import may_choose
from bkn_core.errors import CheckFailedError, InputError, RecipeError
from bkn_core.export.sessions import open_session
from bkn_core.kinds import check_statistics
from bkn_core.recipe import DataConfig, EvalConfig, override_data


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation gave.

    Args:
        target: what was measured.
        metrics: by kind of statistics.
        predictions: the file with every image's label, prediction and loss.
        provider: "PyTorch" or the ONNX Runtime provider, with the device.
        data: whose test images were read, such as `npz in photos.npz`.
        classes: precision and recall of each class and what it is taken for, by kind of statistics.
        warnings: what the user should know.
        priors: how well the layers' priors predict what they see, where that was asked for.
        statistics_batch_size: images of the groups that mixtures are of, where those were asked for.
    """

    target: Path
    metrics: dict[str, Measured]
    predictions: Path
    provider: str
    data: str
    classes: dict[str, ClassReport]
    warnings: tuple[str, ...] = ()
    priors: PriorReport | None = None
    statistics_batch_size: int | None = None


def evaluate(
    target: str | Path | None = None,
    *,
    stats: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    overrides: Sequence[str] = (),
    priors: bool = False,
) -> EvaluationResult:
    """Measure top-1, top-k and loss on test images, and save every image's prediction.

    Args:
        target: a run folder, a .safetensors checkpoint or an .onnx file; default the newest finished run.
        stats: "population", "batch" (each image by itself), "both" or "mixtures" (mean and variance each of the
            population or of groups as in training); default the recipe's, for a file its own.
        batch_size: images per forward pass.
        device: auto, cpu, cuda, cuda:N or mps.
        overrides: `data.*=VALUE` words for other test images than the recipe's; only they lead out of the working
            folder, or download.
        priors: also compare each layer's prior with what it sees of these images, in priors.json and a picture.

    Raises:
        InputError: the target or the data is missing or damaged.
        RecipeError: an override or kind of statistics does not fit.
        DeviceError: the device is not there.
        CheckFailedError: the model gives values that are not finite.
    """
    path = newest_run() if target is None else Path(target)
    if stats not in (None, "population", "batch", "both", "mixtures"):
        raise RecipeError(f"stats is {stats!r}", "Choose one of population, batch, both, mixtures.")
    if batch_size is not None and batch_size < 1:
        raise RecipeError(f"batch_size is {batch_size}", "Give at least 1.")
    if path.suffix.lower() == ".onnx":
        if priors:
            raise RecipeError(f"{path} is an exported file: it holds no priors", "Name the run that it came from.")
        return _evaluate_file(path, stats, batch_size, device, overrides)
    return _evaluate_weights(path, stats, batch_size, device, overrides, priors=priors)


def _evaluate_weights(
    path: Path, stats: str | None, batch_size: int | None, device: str, overrides: Sequence[str], *, priors: bool
) -> EvaluationResult:
    chosen = choose_device(device)
    source = weights_path(path)
    weights = load_weights(source)
    recipe = weights.recipe
    task = task_of(recipe)
    check_statistics(recipe.norm.kind, stats, asked="stats")
    if priors and recipe.norm.kind != "bkn":
        raise RecipeError(f"{path} normalizes by {recipe.norm.kind}, which has no priors", "Only norm.kind=bkn has.")
    data = _data(path, recipe.data, overrides)
    images, notes = _test_images(path, task, data, weights.preprocess, weights.classes, overrides)
    model = weights.model().to(chosen)
    size = batch_size or recipe.eval.batch_size
    metrics = {
        kind: measure_model(
            model,
            images,
            weights.preprocess,
            task=task,
            kind=kind,
            device=chosen,
            batch_size=size,
            topk=recipe.eval.topk,
            channels_last=recipe.train.channels_last,
            statistics_batch_size=recipe.batch.statistics,
        )
        for kind in modes(stats or recipe.eval_stats)
    }
    _check_finite(path, metrics)
    file = path / "evaluation.npz" if path.is_dir() else path.with_suffix(".predictions.npz")
    save_predictions(file, images, metrics)
    seen = _report_classes(path, images, {kind: metrics[kind] for kind in metrics if kind not in MIXTURES})
    report = None
    if priors:
        kind = next(iter(metrics))
        report = report_priors(
            model, images, weights.preprocess, kind=kind, device=chosen, batch_size=size, files=_prior_files(path)
        )
    group = recipe.batch.statistics if stats == "mixtures" else None
    return EvaluationResult(path, metrics, file, f"PyTorch on {chosen}", _named(data), seen, notes, report, group)


def _report_classes(target: Path, images: Images, metrics: Mapping[str, Measured]) -> dict[str, ClassReport]:
    """Report the classes by each kind of statistics; what is written of a second kind is named after it."""
    reports: dict[str, ClassReport] = {}
    for kind, measured in metrics.items():
        suffix = f"-{kind}" if reports else ""
        files = _class_files(target, suffix)
        reports[kind] = report_classes(kind, measured, images, files)
        if measured.shown:
            drawn = files["confusion_plot"]
            files["examples"] = drawn.with_name(drawn.name.replace("confusion", "examples"))
            draw_examples(files["examples"], measured.shown, images.classes)
    return reports


def _class_files(target: Path, suffix: str) -> dict[str, Path]:
    names = {"classes": f"classes{suffix}.csv", "confusion": f"confusion{suffix}.csv"}
    if target.is_dir():
        plot = target / "plots" / f"confusion{suffix}.png"
        return {**{key: target / name for key, name in names.items()}, "confusion_plot": plot}
    names["confusion_plot"] = f"confusion{suffix}.png"
    return {key: target.with_suffix(f".{name}") for key, name in names.items()}


def _prior_files(target: Path) -> dict[str, Path]:
    if target.is_dir():
        return {"priors": target / "priors.json", "priors_plot": target / "plots" / "priors.png"}
    return {"priors": target.with_suffix(".priors.json"), "priors_plot": target.with_suffix(".priors.png")}


def _evaluate_file(
    path: Path, stats: str | None, batch_size: int | None, device: str, overrides: Sequence[str]
) -> EvaluationResult:
    model, task = open_session(path, device=device), Classification()
    own = model.norm["stats"]
    if stats not in (None, own):
        hint = f"Export another with `bkn export --stats {stats}`."
        if stats in ("both", "mixtures"):
            hint = "A file has one kind of statistics: name the run that it came from."
        raise RecipeError(f"{path} normalizes by {own} statistics, not by {stats}", hint)
    source = model.metadata.source
    trained, claimed = find_run(source["weights_sha256"]), source.get("data")
    if trained is None and claimed is None and not overrides:
        raise InputError(f"{path} does not say which data it is for", "Name it: data.name=... data.root=...")
    known = DataConfig.model_validate(claimed or {}) if trained is None else load_weights(trained).recipe.data
    data = _data(path, known, overrides)
    images, notes = _test_images(path, task, data, model.preprocess, model.classes, overrides)
    defaults = EvalConfig()

    def predict(batch: Tensor) -> Tensor:
        return torch.as_tensor(model.logits(normalize(batch, model.preprocess).numpy()))

    size = batch_size or defaults.batch_size
    metrics: dict[str, Measured] = {own: task.measure(predict, images, batch_size=size, topk=defaults.topk)}
    _check_finite(path, metrics)
    file = path.with_suffix(".predictions.npz")
    save_predictions(file, images, metrics)
    seen = _report_classes(path, images, metrics)
    warnings = (model.fell_back, *notes) if model.fell_back else notes
    return EvaluationResult(path, metrics, file, model.provider, _named(data), seen, warnings)


def _data(path: Path, known: DataConfig, overrides: Sequence[str]) -> DataConfig:
    """Return the data to measure on: what is known of the training's, changed by `data.*=VALUE` words.

    Raises:
        RecipeError: another key, or a value that does not fit.
        InputError: the data lie outside the working folder, and no word says so.
    """
    own = known.model_copy(update={"download": False})  # what is measured does not choose to download
    data = override_data(own, overrides, str(path))
    if not may_choose(data) and "data.root" not in _keys(overrides):
        raise InputError(
            f"{path} names the data {data.root!r}, outside the working folder, which a file may not choose",
            f"If these are the data that you mean, name them yourself: data.root={shlex.quote(data.root)}",
        )
    return data


def _named(data: DataConfig) -> str:
    return data.name if data.name in ("digits", "scenes") else f"{data.name} in {data.root}"


def _test_images(
    path: Path, task: Task, data: DataConfig, preprocess: Preprocess, classes: Sequence[str], overrides: Sequence[str]
) -> tuple[Images, tuple[str, ...]]:
    try:
        images, notes = task.load_test(data, preprocess, classes)
    except RecipeError as error:
        if any(key in error.message for key in _keys(overrides)):
            raise
        raise InputError(
            f"{path} names data that cannot be: {error.message}", "Name others: data.KEY=VALUE."
        ) from error
    if [*map(composed, images.classes)] != [*map(composed, classes)]:
        raise InputError(
            f"the test images have {len(images.classes)} classes ({', '.join(images.classes[:3])} ...), "
            f"the model {len(classes)} ({', '.join(list(classes)[:3])} ...)",
            "Measure it on data with the same class names.",
        )
    return images, notes


def _keys(overrides: Sequence[str]) -> list[str]:
    return [word.partition("=")[0].strip() for word in overrides]


def _check_finite(path: Path, metrics: Mapping[str, Measured]) -> None:
    """Refuse to call a measurement what a model gave that does not compute."""
    for kind, measured in metrics.items():
        bad = int((~measured.losses.isfinite()).sum())
        if bad:
            raise CheckFailedError(
                f"{path} gives values that are not finite for {bad} of {measured.images} images ({kind} statistics)",
                "Train it again, or measure an earlier checkpoint.",
            )
