"""The layers of a converted model by their names, and what each sends to those that follow it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.errors import ConversionError
from bkn_core.filter.kalman import Gaussian
from bkn_core.graph.expressions import check_own
from bkn_core.layers.batch_kalman import BatchKalmanNorm


def no_autocast(layer: BatchKalmanNorm) -> torch.autocast:
    """Keep statistics out of mixed precision."""
    device = layer.gain_factor.device.type
    return torch.autocast(device if torch.amp.is_autocast_available(device) else "cpu", enabled=False)


def normalized_message(norm: _BatchNorm) -> Gaussian:
    """Return mean and variance of a layer's output under its own posterior: (β, γ²)."""
    known = next((t for t in (norm.weight, norm.bias, norm.running_mean) if t is not None), torch.empty(0))
    wide = torch.promote_types(known.dtype, torch.float32)
    mean = known.new_zeros(norm.num_features, dtype=wide) if norm.bias is None else norm.bias.to(wide)
    scale = known.new_ones(norm.num_features, dtype=wide) if norm.weight is None else norm.weight.to(wide)
    return Gaussian(mean, scale.square())


def norm_of(model: nn.Module, name: str) -> _BatchNorm:
    """Return a normalization layer by name.

    Raises:
        ConversionError: if the model was changed after its conversion.
    """
    norm = model.get_submodule(name)
    if not isinstance(norm, _BatchNorm):
        raise ConversionError(
            f"{name} was a normalization layer at conversion and is a {type(norm).__name__} now",
            "Change the model first, then convert it again.",
        )
    for own in ("weight", "bias"):
        check_own(norm, name, own)
    return norm


def layer_of(model: nn.Module, name: str) -> BatchKalmanNorm:
    """Return a Batch Kalman Normalization layer by name.

    Raises:
        ConversionError: if the model was changed after its conversion.
    """
    return checked(norm_of(model, name), name)


def checked(layer: nn.Module, name: str) -> BatchKalmanNorm:
    """Return a module as the layer that it was at the conversion.

    Raises:
        ConversionError: if the model was changed after its conversion.
    """
    if not isinstance(layer, BatchKalmanNorm):
        raise ConversionError(f"{name} is a {type(layer).__name__} since the conversion", "Convert the model again.")
    return layer
