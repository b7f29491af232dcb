"""What a Batch Kalman layer refuses: arguments at its construction, batches in its forward."""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor

from bkn_core.errors import ConversionError, StatisticsError


def check_gain(gain: float | str, learn_gain: bool) -> None:
    """Refuse a gain that a filter cannot have.

    Raises:
        ConversionError: a learned gain outside (0, 1), a fixed one outside [0, 1], or a word.
    """
    if not isinstance(gain, Real):
        raise ConversionError(f"gain is {gain!r}", 'Choose "auto" or a number between 0 and 1.')
    inside = 0 < gain < 1 if learn_gain else 0 <= gain <= 1
    if not inside:
        allowed = "between 0 and 1, both excluded, where it is learned" if learn_gain else "between 0 and 1"
        raise ConversionError(f"gain is {gain}", f"The gain must be {allowed}; learn_gain=False allows 0 and 1.")


def check_form(covariance: str, statistics_batch_size: int | None) -> None:
    """Refuse a covariance that has no form and a group without images.

    Raises:
        ConversionError: for either.
    """
    if covariance not in ("diagonal", "full"):
        raise ConversionError(f"covariance is {covariance!r}", "Choose one of diagonal, full.")
    size = statistics_batch_size
    if size is not None and (not isinstance(size, Integral) or size < 1):
        raise ConversionError(f"statistics_batch_size is {size!r}", "It must be a whole number from 1, or None.")


def check_shape(x: Tensor, dimensions: tuple[int, ...], channels: int) -> None:
    """Refuse an activation of another form, as `nn.BatchNorm*` does.

    Raises:
        ValueError: for a number of dimensions that is none of those allowed (any, where there is none), or channels.
    """
    if dimensions and x.dim() not in dimensions:
        raise ValueError(f"expected {' or '.join(f'{n}-D' for n in dimensions)} input (got {x.dim()}-D input)")
    if x.shape[1] != channels:
        raise ValueError(f"expected {channels} channels (got input of shape {tuple(x.shape)})")


def check_values(x: Tensor, statistics_batch_size: int | None, *, has_prior: bool) -> None:
    """Refuse a batch without statistics, and exporters, which crash on our nodes.

    Raises:
        StatisticsError: no image, or a group with one value per channel and no prior.
        ConversionError: this forward is being exported.
    """
    if torch.compiler.is_exporting():
        raise ConversionError(
            "a Batch Kalman layer that normalizes by its batch, as in training mode, cannot be exported",
            "Export bkn.to_batch_norm(model).eval(), or use bkn.export_onnx.",
        )
    images = x.shape[0]
    if images == 0:
        raise StatisticsError("an empty batch has no statistics", "Give at least one image.")
    if has_prior:
        return
    size = images if statistics_batch_size is None else min(statistics_batch_size, images)
    smallest = (images % size or size, *x.shape[1:])
    if smallest[0] * x.shape[2:].numel() == 1:
        raise StatisticsError(
            f"a statistics group of shape {smallest} has one value per channel and the layer has no prior",
            "Use larger images or a larger statistics_batch_size, or convert the whole model so that it has one.",
        )
