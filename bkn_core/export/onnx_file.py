"""Export a model to one ONNX file, which appears only after it was run and compared with the model."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bkn_core.data.preprocess import Preprocess
from bkn_core.engine.files import replacing
from bkn_core.errors import CheckFailedError, InputError, OutputError
from bkn_core.export.graph import set_metadata, signed
from bkn_core.export.latency import measure_latency
from bkn_core.export.metadata import FileMetadata, norm_kind
from bkn_core.export.parity import TOLERANCES, check_parity
from bkn_core.export.plan import (
    OLDEST_OPSET,
    build_graph,
    check_logits,
    check_options,
    plan_export,
)
from bkn_core.export.sessions import open_session
from bkn_core.population import statistics

_LONGEST_NAME = 230  # file systems end at 255; what is written aside has a longer name


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What was written and how it was checked.

    Args:
        path: the file.
        sha256: of its bytes.
        max_abs: largest difference between a logit of the file and of the model.
        top1_agreement: fraction of images with the same top-1.
        images: how many were compared.
        stats: "population", or "batch" where layers observe each image.
        fold: "affine" or "conv", "matrix" where layers whiten; None where none has fixed statistics.
        precision: "fp32" or "fp16".
        opset: version of the operator set.
        nodes: operators in the graph.
        provider: what ONNX Runtime compared it on.
        latency: milliseconds by batch size, where asked for.
    """

    path: Path
    sha256: str
    max_abs: float
    top1_agreement: float
    images: int
    stats: str
    fold: str | None
    precision: str
    opset: int
    nodes: int
    provider: str
    latency: dict[str, Any] | None


def export_model(
    model: nn.Module,
    path: Path | str,
    *,
    example: Tensor,
    images: Tensor | None,
    classes: Sequence[str],
    preprocess: Preprocess,
    source: dict[str, Any],
    stats: str = "population",
    fold: str = "affine",
    precision: str = "fp32",
    opset: int = OLDEST_OPSET,
    statistics_batch_size: int | None = None,
    benchmark: bool = False,
    device: str = "cpu",
) -> ExportResult:
    """Write a model as one ONNX file, once it was run in ONNX Runtime and agreed with the model.

    Args:
        model: from normalized images to logits; with the layers that `convert` makes, or any others.
        path: the file, or a link to it; what stood there is replaced only by a file that passed.
        example: images to trace with.
        images: real images for the comparison.
        classes: names in the order of the logits.
        preprocess: how a picture becomes the input.
        source: where the weights come from: model, weights_sha256.
        stats: "population" makes every norm layer a fixed affine map, "batch" lets it observe each image by itself.
        fold: "conv" merges affine maps into the convolutions before them.
        precision: "fp16" halves the weights; input and output stay float32.
        opset: version of the operator set.
        statistics_batch_size: of the training, for the metadata.
        benchmark: measure latency.
        device: what ONNX Runtime compares on: "cpu", "cuda", "cuda:N" or "auto".

    Shape:
        example, images (N, C, H, W) float32, normalized.

    Raises:
        RecipeError: an option that does not exist.
        ConversionError: the model cannot be exported so.
        CheckFailedError: file and model disagree; no file was written.
        OutputError: the file cannot be written.
        DeviceError: the device is not there.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))  # a link stays one
    check_options(stats=stats, fold=fold, precision=precision, opset=opset)
    _check_target(target)
    reference = copy.deepcopy(model).cpu().float().eval()
    example, images = _plain(example), None if images is None else _plain(images)
    plan = plan_export(reference, stats, fold)
    check_logits(plan.model, example, classes, preprocess)
    proto = build_graph(plan, example, precision=precision, opset=opset)
    with statistics(reference, plan.stats, 1):
        tolerance = TOLERANCES[precision]
        parity = check_parity(
            proto, reference, example, images, tolerance=tolerance, device=device, prepared=plan.model
        )
    norm = {
        "kind": norm_kind(model),
        "stats": plan.stats,
        "folded": plan.fold,
        "statistics_batch_size": statistics_batch_size,
    }
    checked = dataclasses.asdict(parity)
    set_metadata(proto, FileMetadata(tuple(map(str, classes)), preprocess, norm, source, checked).texts())
    graph = signed(proto)
    latency = measure_latency(graph, example, device) if benchmark else None
    _write(target, graph)
    return ExportResult(
        path=path,
        sha256=hashlib.sha256(graph).hexdigest(),
        **checked,
        stats=plan.stats,
        fold=plan.fold,
        precision=precision,
        opset=opset,
        nodes=len(proto.graph.node),
        latency=latency,
    )


def _plain(images: Tensor) -> Tensor:
    return images.detach().cpu().float().contiguous()


def _check_target(path: Path) -> None:
    """Find out before the work whether a file can be written, and make its folder."""
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise OutputError(f"the name {path.name[:40]}... is too long", f"Give one of at most {_LONGEST_NAME} bytes.")
    if path.is_dir():
        raise OutputError(f"{path} is a folder", "Give the name of a file, such as model.onnx.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent} cannot be made: {error.strerror}", "Choose another folder.") from error
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path.parent} is not writable", "Choose another folder.")


def _write(path: Path, graph: bytes) -> None:
    """Write the file aside, open it as a user would, and only then give it its name."""
    with replacing(path) as aside:
        aside.write_bytes(graph)
        try:
            open_session(aside, "cpu")
        except InputError as error:
            raise CheckFailedError(f"the written file cannot be opened: {error.message}", error.hint) from error
