"""The layer of another kind that takes a batch normalization layer's around."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.layers.baselines import FrozenNorm
from bkn_core.layers.factory import inherit
from bkn_core.layers.rivals.cross_iteration import CrossIterationNorm
from bkn_core.layers.rivals.group_kalman import GroupKalmanNorm
from bkn_core.layers.rivals.moving_average import MovingAverageNorm
from bkn_core.layers.rivals.online import OnlineNorm
from bkn_core.layers.rivals.propagation import NormalizationPropagation
from bkn_core.layers.rivals.reference import ReferenceNorm
from bkn_core.layers.rivals.response import EvoNorm, FilterResponseNorm
from bkn_core.layers.rivals.weights import CentredWeight, StandardizedWeight, UnitWeight
from bkn_core.layers.rivals.whitening import IterativeNorm


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """Where a layer stands.

    Args:
        statistics_batch_size: images per statistics group; None is the whole batch.
        positions: values per channel of one image.
        activates: whether the layer takes over the ReLU behind it.
    """

    statistics_batch_size: int | None
    positions: int
    activates: bool


def _mabn(norm: _BatchNorm, around: Surroundings) -> nn.Module:
    return MovingAverageNorm(norm.num_features, norm.eps, statistics_batch_size=around.statistics_batch_size)


def _gn_ws(norm: _BatchNorm, _: Surroundings) -> nn.Module:
    return nn.GroupNorm(_groups(norm), norm.num_features, norm.eps)


def _online(norm: _BatchNorm, _: Surroundings) -> nn.Module:
    return OnlineNorm(norm.num_features, norm.eps)


def _frn(norm: _BatchNorm, around: Surroundings) -> nn.Module:
    alone = around.positions == 1
    return FilterResponseNorm(norm.num_features, norm.eps, learns_eps=alone, activates=around.activates)


def _evonorm(norm: _BatchNorm, _: Surroundings) -> nn.Module:
    return EvoNorm(norm.num_features, norm.eps, groups=_groups(norm))


def _frozen(norm: _BatchNorm, _: Surroundings) -> nn.Module:
    return FrozenNorm(norm.num_features, norm.eps, norm.momentum)


def _reference(norm: _BatchNorm, _: Surroundings) -> nn.Module:
    return ReferenceNorm(norm.num_features, norm.eps)


def _iternorm(norm: _BatchNorm, around: Surroundings) -> nn.Module:
    size, block = around.statistics_batch_size, _groups(norm)
    return IterativeNorm(norm.num_features, norm.eps, norm.momentum, statistics_batch_size=size, block=block)


def _gkn(norm: _BatchNorm, _: Surroundings) -> nn.Module:
    return GroupKalmanNorm(_groups(norm), norm.num_features, norm.eps)


def _normprop(norm: _BatchNorm, around: Surroundings) -> nn.Module:
    return NormalizationPropagation(norm.num_features, norm.eps, activates=around.activates)


def _cbn(norm: _BatchNorm, around: Surroundings) -> nn.Module:
    size = around.statistics_batch_size
    return CrossIterationNorm(norm.num_features, norm.eps, norm.momentum, statistics_batch_size=size)


def _groups(norm: _BatchNorm) -> int:
    return math.gcd(8, norm.num_features)


BUILDERS: dict[str, Callable[[_BatchNorm, Surroundings], nn.Module]] = {
    "gn_ws": _gn_ws,
    "mabn": _mabn,
    "online": _online,
    "frn": _frn,
    "evonorm": _evonorm,
    "frozen": _frozen,
    "reference": _reference,
    "fixed": _reference,
    "iternorm": _iternorm,
    "gkn": _gkn,
    "normprop": _normprop,
    "cbn": _cbn,
}
"""By kind: from the old layer and its place to the new layer."""

WEIGHTS: dict[str, type[nn.Module]] = {"gn_ws": StandardizedWeight, "mabn": CentredWeight, "normprop": UnitWeight}
"""By kind: what becomes of the weights of the convolution before a layer."""

ACTIVATING = frozenset({"frn", "evonorm", "normprop"})
"""Kinds that take over the ReLU behind them, where it alone reads them and is a module of its own."""


def rival_layer(norm: _BatchNorm, kind: str, around: Surroundings) -> nn.Module:
    """Build a layer of a kind, with the old layer's γ, β and statistics where it has any.

    Args:
        norm: the old layer.
        kind: one of `BUILDERS`.
        around: where it stands.
    """
    layer = BUILDERS[kind](norm, around)
    held = norm.weight if norm.weight is not None else norm.running_mean
    if held is not None:
        layer = layer.to(held.device, held.dtype)
    inherit(norm, layer)
    if isinstance(layer, MovingAverageNorm | IterativeNorm | NormalizationPropagation):
        layer.take_over_(norm)
    return layer
