"""The verb `export_onnx`: from a run folder to a checked ONNX file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bkn_core.data.batches import normalize
from bkn_core.data.preprocess import Preprocess
from bkn_core.data.splits import load_test_images
from bkn_core.engine.checkpoint import load_weights, weights_path
from bkn_core.engine.models import example_images
from bkn_core.engine.run_folder import newest_run
from bkn_core.engine.trust import may_choose
from bkn_core.errors import BknError, RecipeError
from bkn_core.export.onnx_file import ExportResult, export_model
from bkn_core.kinds import check_statistics
from bkn_core.recipe import DataConfig

_IMAGES = 64  # real test images that the file and the model must agree on


def export_onnx(
    output: str | Path,
    *,
    run: str | Path | None = None,
    stats: str = "population",
    fold: str = "affine",
    precision: str = "fp32",
    opset: int = 18,
    benchmark: bool = False,
    device: str = "cpu",
) -> ExportResult:
    """Write a trained model as an ONNX file that was run and agrees with the unfolded model.

    Args:
        output: the file to write.
        run: a run folder or checkpoint; default the newest finished run. Its data are compared on where they are in the
            working folder, else noise alone.
        stats: "population" folds the moving statistics, "batch" normalizes each image by itself and the priors.
        fold: "affine" leaves a Mul and an Add per layer, "conv" merges them into the convolution before.
        precision: "fp32", or "fp16" with float32 input and output.
        opset: the operator set.
        benchmark: measure latency.
        device: where ONNX Runtime runs the check: cpu, auto, cuda or cuda:N.

    Raises:
        InputError: the run is missing or damaged.
        RecipeError: an argument does not exist, or the output is not named .onnx.
        CheckFailedError: file and model disagree; no file is left.
    """
    if Path(output).suffix.lower() != ".onnx":
        raise RecipeError(f"{output} does not end in .onnx", "Give the name of a file, such as model.onnx.")
    weights = load_weights(weights_path(newest_run() if run is None else Path(run)))
    preprocess, recipe = weights.preprocess, weights.recipe
    if recipe.task != "classification":
        raise RecipeError(
            f"the task is {recipe.task}: files are of classifiers only", "Load the run with bkn.load_run."
        )
    check_statistics(recipe.norm.kind, stats, asked="stats")
    data = recipe.data
    try:
        images = _images(data, preprocess) if may_choose(data) else None
    except BknError:
        images = None  # the data need not be where the model is deployed from: noise is compared then
    # A file that is handed on must not carry a path of the machine where it was made.
    root = {} if Path(data.root).is_absolute() else {"root": data.root}
    origin = {"name": data.name, "test_images": data.test_images, **root}
    return export_model(
        weights.model(),
        Path(output),
        example=example_images(1 if preprocess.color == "L" else 3, preprocess.image_size),
        images=images,
        classes=weights.classes,
        preprocess=preprocess,
        stats=stats,
        fold=fold,
        precision=precision,
        opset=opset,
        source={"model": recipe.model.name, "weights_sha256": weights.digest, "data": origin},
        statistics_batch_size=recipe.batch.statistics,
        benchmark=benchmark,
        device=device,
    )


def _images(data: DataConfig, preprocess: Preprocess) -> Tensor:
    found, _ = load_test_images(data.name, root=data.root, preprocess=preprocess, test_images=data.test_images)
    chosen = torch.linspace(0, len(found) - 1, min(_IMAGES, len(found))).long()
    return normalize(found.batch(chosen)[0], preprocess)
