"""What of a model goes into an ONNX graph: which statistics normalize, what is folded, in which precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bkn_core.convert import fold as fold_model
from bkn_core.data.preprocess import Preprocess
from bkn_core.errors import ConversionError, RecipeError
from bkn_core.export import batch_statistics
from bkn_core.export.folding import merge_affine
from bkn_core.export.graph import canonical, nodes_of, trace
from bkn_core.export.precision import to_half
from bkn_core.layers.baselines import ChannelAffine
from bkn_core.layers.batch_kalman import Statistics
from bkn_core.layers.rivals.whitening import ChannelMatrix

Fold = Literal["affine", "conv"]
Precision = Literal["fp32", "fp16"]
NEWEST_OPSET = 26  # what ONNX Runtime was found to run
OLDEST_OPSET = 18  # what the exporter writes of itself; it cannot reliably go back


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model as it will be traced.

    Args:
        model: made of layers that ONNX can hold, in evaluation mode.
        stats: "batch" where layers observe each image, else "population".
        fold: "affine" or "conv", "matrix" where layers whiten, None where none has fixed statistics.
    """

    model: nn.Module
    stats: Statistics
    fold: str | None


def check_options(*, stats: str, fold: str, precision: str, opset: int) -> None:
    """Refuse options that do not exist.

    Raises:
        RecipeError: names the option, its value and what is allowed.
    """
    from onnx.defs import onnx_opset_version

    newest = min(onnx_opset_version(), NEWEST_OPSET)

    allowed = {"stats": (stats, Statistics), "fold": (fold, Fold), "precision": (precision, Precision)}
    for name, (value, choices) in allowed.items():
        if value not in get_args(choices):
            raise RecipeError(f"{name} is {value!r}", f"Choose one of {', '.join(get_args(choices))}.")
    if not OLDEST_OPSET <= opset <= newest:
        raise RecipeError(f"opset is {opset}", f"Choose from {OLDEST_OPSET} to {newest}.")


def plan_export(model: nn.Module, stats: str, fold: str) -> Plan:
    """Return a copy of a model in the form that is traced.

    Args:
        model: on the CPU, in float32, in evaluation mode.
        stats: which statistics normalize.
        fold: where fixed affine maps go.

    Raises:
        ConversionError: a layer lacks the statistics that it would need.
    """
    kalman = 0
    if stats == "batch":
        prepared, kalman = batch_statistics.with_image_statistics(model)
    else:
        prepared = fold_model(model)
    made = {type(module) for module in prepared.modules()}
    folded = fold if ChannelAffine in made else "matrix" if ChannelMatrix in made else None
    return Plan(prepared, "batch" if kalman else "population", folded)


@torch.no_grad()
def check_logits(model: nn.Module, example: Tensor, classes: Sequence[str], preprocess: Preprocess) -> None:
    """Refuse a model, images, classes and preprocessing that do not belong together.

    Raises:
        ConversionError: names what does not fit.
    """
    wanted = (len(preprocess.mean), *preprocess.image_size)
    if tuple(example.shape[1:]) != wanted:
        raise ConversionError(
            f"the example has the shape {tuple(example.shape)}, the preprocessing makes (N, {wanted})"
        )
    logits = model(example[:2])
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (len(example[:2]), len(classes)):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConversionError(f"the model returns {found} for {len(example[:2])} images and {len(classes)} classes")


def build_graph(plan: Plan, example: Tensor, *, precision: str, opset: int) -> Any:
    """Return the `onnx.ModelProto` of a plan, without metadata.

    Raises:
        ConversionError: the model cannot be traced, or not for this operator set.
    """
    proto = trace(plan.model, example, opset)
    if plan.fold == "conv":
        merge_affine(proto)
    if precision == "fp16":
        proto = to_half(proto, nodes_of(proto, batch_statistics.__name__))
    canonical(proto)
    found = next(entry.version for entry in proto.opset_import if entry.domain == "")
    if found != opset:
        raise ConversionError(f"the model cannot be written for opset {opset}", f"Use opset {found}.")
    return proto
