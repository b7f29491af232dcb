"""What conversion makes of one published architecture."""

from __future__ import annotations

import collections
import dataclasses
import warnings

import torch
from architectures import Architecture, draw_norms
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

import bkn_core as bkn
from bkn_core.graph.trace import trace

MOST_PARAMETERS = 150_000_000  # of larger models only the graph is looked at, on the meta device


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How one model was converted.

    Args:
        architecture: which.
        layers: its normalization layers.
        reasons: why those without a prior have none, and how many.
        error: largest difference of the converted model's outputs in evaluation, relative to the largest output; None
            where only the graph was looked at.
    """

    architecture: Architecture
    layers: int
    reasons: dict[str, int]
    error: float | None

    @property
    def after_first(self) -> int:
        """Layers after the first."""
        return self.layers - 1

    @property
    def with_prior(self) -> int:
        """Those of them that have a prior."""
        return self.after_first - sum(self.reasons.values())


def cover(architecture: Architecture) -> Coverage:
    """Convert a model and compare its outputs, or look at the graph of one that is too large for that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # models warn about themselves
        if architecture.parameters() > MOST_PARAMETERS:
            return _graph_only(architecture)
        model = architecture.build().eval()
        draw_norms(model)
        images, expected = _smallest(architecture, model)
        converted = bkn.convert(model, images, input_prior=images)
        reasons = [report.reason for report in bkn.conversion_report(converted) if report.prior is None]
        with torch.no_grad():
            outputs = _tensors(converted.eval()(images))
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(outputs, expected, strict=True))
    return Coverage(architecture, _norms(model), dict(collections.Counter(reasons)), error)


def _graph_only(architecture: Architecture) -> Coverage:
    with torch.device(architecture.device):
        model = architecture.build()
        graph = trace(model, architecture.images(architecture.sides()[-1], 2, architecture.device))
    return Coverage(architecture, _norms(model), dict(collections.Counter(graph.reasons.values())), None)


def _smallest(architecture: Architecture, model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Return the smallest images that a model accepts, and its outputs."""
    *smaller, largest = architecture.sides()
    for side in smaller:
        try:
            images = architecture.images(side)
            with torch.no_grad():
                return images, _tensors(model(images))
        except (RuntimeError, AssertionError, ValueError, IndexError):
            continue  # the model was built for larger ones
    images = architecture.images(largest)
    with torch.no_grad():
        return images, _tensors(model(images))


def _tensors(outputs: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())
