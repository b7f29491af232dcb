"""The gate of an export: ONNX Runtime against the model itself, on noise and on real images, batch by batch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bkn_core.errors import CheckFailedError, InputError
from bkn_core.export.difference import explained
from bkn_core.export.graph import to_bytes
from bkn_core.export.providers import OPTIMIZATION_LEVELS, create_session, run_session

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2}  # of |a - b| <= t + t |b|
BATCH_SIZES = (1, 2, 7)
_REST = 32  # images per batch after the first ten
Logits = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far a graph is from its model.

    Args:
        max_abs: largest |a - b|, over optimization levels too.
        top1_agreement: fraction of images with the same highest logit; a tie within the tolerance agrees.
        images: how many were compared.
        provider: what ONNX Runtime ran on.
    """

    max_abs: float
    top1_agreement: float
    images: int
    provider: str


def check_parity(
    proto: Any,
    reference: Callable[[Tensor], Tensor],
    example: Tensor,
    images: Tensor | None,
    *,
    tolerance: float,
    device: str = "cpu",
    prepared: nn.Module | None = None,
) -> Parity:
    """Compare a graph with its model at batch 1, 2 and 7, with and without ONNX Runtime's optimizations.

    Args:
        proto: the `onnx.ModelProto`.
        reference: the unfolded model.
        example: images whose shape the noise takes.
        images: real images, or None.
        tolerance: t of |a - b| <= t + t |b|.
        device: what ONNX Runtime is to run on.
        prepared: what was traced, to say where a difference begins.

    Raises:
        CheckFailedError: the two disagree, with the first image and layer that do, or the graph does not run.
        DeviceError: the device is not there.
    """
    graph = _checked_bytes(proto)
    named = _noise(example) + ([] if images is None else _split(images))
    batches = [batch for _, batch in named]
    with torch.no_grad():
        expected = [reference(batch).float().numpy() for batch in batches]
    worst, agreed, provider = 0.0, 0, ""
    for level in OPTIMIZATION_LEVELS:
        found, provider = _logits(graph, batches, device, level)
        for (name, batch), logits, wanted in zip(named, found, expected, strict=True):

            def explain(batch: Tensor = batch) -> str:
                return explained(reference, prepared, batch, tolerance)

            difference, same = _compare(logits, wanted, tolerance, f"{name}, {level}, {provider}", explain)
            worst, agreed = max(worst, difference), agreed + same
    count = sum(len(batch) for batch in batches)
    return Parity(float(f"{worst:.2e}"), agreed / (count * len(OPTIMIZATION_LEVELS)), count, provider)


def _checked_bytes(proto: Any) -> bytes:
    """Return the bytes of a graph that the ONNX checker accepts."""
    import onnx

    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckFailedError(
            f"the ONNX checker refuses the graph: {str(error)[:300]}; no file was written"
        ) from error
    return to_bytes(proto)


def _logits(graph: bytes, batches: list[Tensor], device: str, level: str) -> tuple[list[Logits], str]:
    """Return ONNX Runtime's logits of every batch, and the provider that made them."""
    try:
        opened = create_session(graph, device, level=level, exact=True)
        return [run_session(opened.session, batch.numpy()) for batch in batches], opened.provider
    except InputError as error:
        raise CheckFailedError(f"{error.message} ({level}); no file was written") from error


def _compare(
    found: Logits, wanted: Logits, tolerance: float, where: str, explain: Callable[[], str]
) -> tuple[float, int]:
    """Return the largest difference and the number of images with the same top-1."""
    if found.shape != wanted.shape:
        raise CheckFailedError(
            f"the ONNX graph gives logits of shape {found.shape}, the model {wanted.shape} ({where})"
        )
    if not np.isfinite(wanted).all():
        raise CheckFailedError(f"the model gives logits that are not finite ({where})", "Check its weights.")
    difference = np.abs(found - wanted)
    allowed = tolerance + tolerance * np.abs(wanted)
    if not (difference <= allowed).all():
        at = np.unravel_index(np.argmax(difference - allowed), difference.shape)
        first = int(np.argmin((difference <= allowed).all(1)))
        raise CheckFailedError(
            f"the ONNX graph and the model differ by {difference[at]:.3g} at a logit of {wanted[at]:.3g}, "
            f"where {allowed[at]:.3g} is allowed (first in image {first} of {where}){explain()}; no file was written"
        )
    rows = np.arange(len(wanted))
    best, chosen = wanted.argmax(1), found.argmax(1)
    margin = wanted[rows, best] - wanted[rows, chosen]
    same = margin <= allowed[rows, best] + allowed[rows, chosen]
    return float(difference.max()), int(same.sum())


def _noise(example: Tensor) -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (f"a noise batch of {size}", torch.randn(size, *example.shape[1:], generator=generator)) for size in BATCH_SIZES
    ]


def _split(images: Tensor) -> list[tuple[str, Tensor]]:
    sizes, left = [], len(images)
    for size in (*BATCH_SIZES, *[_REST] * (left // _REST + 1)):
        sizes.append(min(size, left))
        left -= sizes[-1]
    starts = itertools.accumulate(sizes, initial=0)
    parts = zip(starts, torch.split(images, sizes), strict=False)
    named = [(f"a batch of {len(part)}, images {start} to {start + len(part) - 1}", part) for start, part in parts]
    return [(name, part) for name, part in named if len(part)]
