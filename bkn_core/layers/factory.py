"""Layers that take the place of a batch normalization layer and keep what it learned."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.errors import ConversionError
from bkn_core.filter.kalman import Gaussian
from bkn_core.layers.baselines import BatchRenorm, ChannelAffine
from bkn_core.layers.batch_kalman import BatchKalmanNorm, BatchKalmanNorm1d, BatchKalmanNorm2d, BatchKalmanNorm3d
from bkn_core.layers.rivals.groups import Rival

_INITIAL_NOISE = 0.1  # its square is r
_LAYERS: dict[type[nn.Module], type[BatchKalmanNorm]] = {
    nn.BatchNorm1d: BatchKalmanNorm1d,
    nn.BatchNorm2d: BatchKalmanNorm2d,
    nn.BatchNorm3d: BatchKalmanNorm3d,
    nn.SyncBatchNorm: BatchKalmanNorm,
}


class BatchKalmanNormAct(BatchKalmanNorm):
    """`BatchKalmanNorm` followed by the dropout and activation of the fused layer whose place it takes."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor, prior: Gaussian | None = None) -> Tensor:
        """Normalize, drop, activate."""
        y: Tensor = self.act(self.drop(super().forward(x, prior)))
        return y


def kalman_layer(norm: _BatchNorm, *, has_prior: bool, **options: Any) -> BatchKalmanNorm:
    """Build the Batch Kalman layer that takes a batch normalization layer's like.

    Args:
        norm: the old layer; parameters, moving statistics and frozen flags are copied.
        has_prior: whether its model will hand it a prior.
        options: what `BatchKalmanNorm` takes by keyword.
    """
    wanted = next((layer for plain, layer in _LAYERS.items() if isinstance(norm, plain)), BatchKalmanNorm)
    wanted = BatchKalmanNormAct if "act" in norm._modules else wanted
    like = norm.weight if norm.weight is not None else norm.running_mean
    layer = wanted(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
        device=None if like is None else like.device,
        dtype=None if like is None else like.dtype,
        bias=norm.bias is not None,
        **options,
    )
    inherit(norm, layer)
    known = list(norm.parameters(recurse=False))
    if known and not any(parameter.requires_grad for parameter in known):
        layer.requires_grad_(False)  # a frozen layer has nothing that an optimizer or its weight decay may move
    if isinstance(layer, BatchKalmanNormAct):  # timm's BatchNormAct2d
        layer.drop, layer.act = norm._modules.get("drop") or nn.Identity(), norm._modules["act"] or nn.Identity()
    if isinstance(norm, nn.SyncBatchNorm):
        layer.synchronized, layer.process_group = True, norm.process_group
    layer.expects_prior = has_prior
    layer.predecessor = None if type(norm) in _LAYERS and type(norm) is not nn.SyncBatchNorm else (_shell(norm),)
    return layer


def add_noise_(layers: Sequence[BatchKalmanNorm]) -> None:
    """Give the first of the layers with learned transitions, in place, the noise that they share."""
    if layers:
        start = torch.full_like(layers[0].gain_factor, _INITIAL_NOISE)
        is_trained = any(layer.transition is not None and layer.transition.requires_grad for layer in layers)
        layers[0].transition_noise = nn.Parameter(start, is_trained)


def baseline_layer(norm: _BatchNorm, kind: str, statistics_batch_size: int | None) -> nn.Module:
    """Build a layer of another kind, with the old layer's γ and β where it has any.

    Args:
        norm: the old layer.
        kind: bn, brn, gn (at most 8 groups), ln, in or none.
        statistics_batch_size: images per statistics group, for bn and brn.
    """
    channels, eps = norm.num_features, norm.eps
    if kind == "bn":
        size = statistics_batch_size
        return kalman_layer(norm, has_prior=False, statistics_batch_size=size, gain=1.0, learn_gain=False)
    layers: dict[str, Callable[[], nn.Module]] = {
        "brn": lambda: BatchRenorm(
            channels, eps, 0.1 if norm.momentum is None else norm.momentum, statistics_batch_size=statistics_batch_size
        ),
        "gn": lambda: nn.GroupNorm(math.gcd(8, channels), channels, eps),
        "ln": lambda: nn.GroupNorm(1, channels, eps),
        "in": lambda: nn.GroupNorm(channels, channels, eps),
        "none": nn.Identity,
    }
    like = norm.weight if norm.weight is not None else norm.running_mean
    layer = layers[kind]()
    if like is not None:
        layer = layer.to(like.device, like.dtype)
    inherit(norm, layer)
    return layer


def plain_layer(name: str, norm: _BatchNorm) -> nn.Module:
    """Return the layer that a Batch Kalman layer took the place of, with its parameters and population statistics."""
    if isinstance(norm, BatchKalmanNorm) and norm.predecessor is not None:
        return _restored(norm.predecessor[0], norm)
    kinds = {layer: plain for plain, layer in _LAYERS.items() if plain is not nn.SyncBatchNorm}
    plain = next((kind for layer, kind in kinds.items() if isinstance(norm, layer)), nn.BatchNorm2d)
    like = norm.weight if norm.weight is not None else norm.running_mean
    made = plain(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    if norm.bias is None:
        made.register_parameter("bias", None)
    if like is not None:
        made = made.to(like.device, like.dtype)
    inherit(norm, made)
    return made


def _shell(norm: _BatchNorm) -> _BatchNorm:
    """Copy a layer of a kind of its own without its tensors and submodules."""
    shell = copy.copy(norm)
    for contents in ("_parameters", "_buffers", "_modules"):
        shell.__dict__[contents] = dict.fromkeys(getattr(norm, contents))
    return shell


def _restored(shell: _BatchNorm, layer: _BatchNorm) -> _BatchNorm:
    """Fill a shell again."""
    norm = copy.copy(shell)
    for contents in ("_parameters", "_buffers", "_modules"):
        norm.__dict__[contents] = {name: getattr(layer, contents).get(name) for name in getattr(shell, contents)}
    return norm


def folded_layer(name: str, norm: _BatchNorm) -> nn.Module:
    """Return what a layer is in evaluation mode: an affine map, or what layers of other authors become.

    Raises:
        ConversionError: for a layer that keeps no population statistics.
    """
    if isinstance(norm, Rival):
        return norm.folded(lambda: _affine(name, norm))
    return _affine(name, norm)


def _affine(name: str, norm: _BatchNorm) -> ChannelAffine:
    """Return the affine map of γ, β and the population statistics, computed in float64."""
    if norm.running_mean is None or norm.running_var is None:
        raise ConversionError(
            f"{name} keeps no population statistics and cannot be folded", "Use track_running_stats=True."
        )
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    shift = -scale * norm.running_mean.double()
    shift = shift if norm.bias is None else shift + norm.bias.detach().double()
    return ChannelAffine(scale.to(norm.running_mean.dtype), shift.to(norm.running_mean.dtype))


def inherit(norm: _BatchNorm, layer: nn.Module) -> None:
    """Give a new layer the parameters and moving statistics of the old one: themselves, so that tied ones stay tied."""
    for own, old in ((layer._parameters, norm._parameters), (layer._buffers, norm._buffers)):
        for name, tensor in old.items():
            if tensor is not None and own.get(name) is not None:
                own[name] = tensor  # type: ignore[assignment]
