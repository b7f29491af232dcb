"""What layers do to small vectors, done for many layers at once: a few operations on all channels, not a few per layer.

A network has dozens of normalization layers, and an operation on a vector of channels costs its overhead, not its
arithmetic. Vectors of layers that are alike are laid side by side, computed on, and split again.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bkn_core.filter import kalman
from bkn_core.filter.kalman import Gaussian

if TYPE_CHECKING:
    from bkn_core.layers.batch_kalman import BatchKalmanNorm


def alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """Return the positions of equal keys, in the order of their first appearance."""
    if len(keys) == 1:
        return [[0]]  # whose key may hold sizes of an exported graph, which cannot be compared
    found: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return list(found.values())


def beside(vectors: Sequence[Tensor]) -> Tensor:
    """Lay vectors side by side."""
    return vectors[0] if len(vectors) == 1 else torch.cat(list(vectors), -1)


def existing(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the tensors that are there."""
    return [tensor for tensor in tensors if tensor is not None]


def apart(values: Tensor, layers: Sequence[BatchKalmanNorm]) -> Sequence[Tensor]:
    """Split what belongs to layers side by side."""
    return (values,) if len(layers) == 1 else torch.split(values, [layer.num_features for layer in layers], -1)


def refine(layers: Sequence[BatchKalmanNorm], priors: Sequence[Gaussian]) -> list[Gaussian]:
    """Apply each layer's learned correction and inflations to its prior.

    µ' + (δ + mean inflation) sqrt(v' + ε),   v' exp(ρ + inflation)
    """
    refined = list(priors)
    for numbers in alike([_form(*pair) for pair in zip(layers, priors, strict=True)]):
        chosen = [layers[i] for i in numbers]
        prior = Gaussian(beside([priors[i].mean for i in numbers]), beside([priors[i].variance for i in numbers]))
        offset, log_scale, shift, inflation = (
            _beside_or_none(tensors) for tensors in zip(*map(_refinement, chosen), strict=True)
        )
        mean, variance = kalman.refine(prior, (offset, log_scale), (shift, inflation), chosen[0].eps)
        for i, *parts in zip(numbers, apart(mean, chosen), apart(variance, chosen), strict=True):
            refined[i] = Gaussian(*parts)
    return refined


def _refinement(layer: BatchKalmanNorm) -> tuple[Tensor | None, ...]:
    inflations = layer.present_mean_inflation, layer.present_inflation
    return layer.prior_offset, layer.prior_log_scale, *inflations


def _beside_or_none(vectors: Sequence[Tensor | None]) -> Tensor | None:
    known = existing(vectors)
    return beside(known) if known else None


def _form(layer: BatchKalmanNorm, prior: Gaussian) -> Hashable:
    if prior.variance.dim() > prior.mean.dim():
        return id(layer)  # matrices of different sizes cannot be laid side by side
    corrected, observed = layer.prior_offset is not None, layer.innovation is not None
    return corrected, observed, layer.eps, prior.mean.shape[:-1], prior.mean.dtype, prior.mean.device


def gains(layers: Sequence[BatchKalmanNorm]) -> list[Tensor]:
    """Return each layer's gain q, schedule included."""
    found = [layer.fixed_gain if layer.gain_logit is None else layer.gain_logit for layer in layers]
    for numbers in alike([(layers[i].gain_logit is None, v.dtype, v.device) for i, v in enumerate(found)]):
        values = torch.stack([found[i] for i in numbers])
        if layers[numbers[0]].gain_logit is not None:
            values = values.sigmoid()
        factors = torch.stack([layers[i].gain_factor for i in numbers])
        for i, gain in zip(numbers, (values * factors).unbind(), strict=True):
            found[i] = gain
    return found
