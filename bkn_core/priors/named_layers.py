"""The layers of a converted model: by name, what each sends to those that follow, the priors and gains of all."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.errors import ConversionError
from bkn_core.filter import kalman
from bkn_core.filter.kalman import Gaussian
from bkn_core.graph.expressions import check_own
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.ops.track import alike, apart, beside, existing

_REFINEMENT = ("prior_offset", "prior_log_scale", "present_mean_inflation", "present_inflation")


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


def refine(layers: Sequence[BatchKalmanNorm], priors: Sequence[Gaussian]) -> list[Gaussian]:
    """Apply each layer's learned correction and inflations to its prior.

    µ' + (δ + mean inflation) sqrt(v' + ε),   v' exp(ρ + inflation)
    """
    refined = list(priors)
    for numbers in alike([_form(*pair) for pair in zip(layers, priors, strict=True)]):
        chosen = [layers[i] for i in numbers]
        widths = [layer.num_features for layer in chosen]
        prior = Gaussian(beside([priors[i].mean for i in numbers]), beside([priors[i].variance for i in numbers]))
        parts = [existing([getattr(layer, name) for layer in chosen]) for name in _REFINEMENT]
        offset, log_scale, shift, inflation = (beside(vectors) if vectors else None for vectors in parts)
        mean, variance = kalman.refine(prior, (offset, log_scale), (shift, inflation), chosen[0].eps)
        for i, *moments in zip(numbers, apart(mean, widths), apart(variance, widths), strict=True):
            refined[i] = Gaussian(*moments)
    return refined


def _form(layer: BatchKalmanNorm, prior: Gaussian) -> Hashable:
    if prior.variance.dim() > prior.mean.dim():
        return id(layer)  # matrices of different sizes cannot be laid side by side
    corrected, observed = layer.prior_offset is not None, layer.innovation is not None
    return corrected, observed, layer.eps, prior.mean.shape[:-1], prior.mean.dtype, prior.mean.device


def gains_of(layers: Mapping[str, BatchKalmanNorm]) -> dict[str, Tensor]:
    """Return each layer's gain q, schedule included."""
    known = list(layers.values())
    found = [layer.fixed_gain if layer.gain_logit is None else layer.gain_logit for layer in known]
    for numbers in alike([(known[i].gain_logit is None, v.dtype, v.device) for i, v in enumerate(found)]):
        values = torch.stack([found[i] for i in numbers])
        if known[numbers[0]].gain_logit is not None:
            values = values.sigmoid()
        factors = torch.stack([known[i].gain_factor for i in numbers])
        for i, gain in zip(numbers, (values * factors).unbind(), strict=True):
            found[i] = gain
    return dict(zip(layers, found, strict=True))
