"""The layer of another kind that takes a batch normalization layer's place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.norm.baselines import FrozenNorm
from bkn_core.norm.rivals.cross_iteration import CrossIterationNorm
from bkn_core.norm.rivals.group_kalman import GroupKalmanNorm
from bkn_core.norm.rivals.moving_average import MovingAverageNorm
from bkn_core.norm.rivals.online import OnlineNorm
from bkn_core.norm.rivals.propagation import NormalizationPropagation
from bkn_core.norm.rivals.reference import ReferenceNorm
from bkn_core.norm.rivals.response import EvoNorm, FilterResponseNorm
from bkn_core.norm.rivals.weights import CentredWeight, StandardizedWeight, UnitWeight
from bkn_core.norm.rivals.whitening import IterativeNorm
from bkn_core.norm.successors import inherit


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer stands.

    Args:
        statistics_batch_size: images per statistics group; None is the whole batch.
        positions: values per channel of one image.
        activates: whether the layer takes over the ReLU behind it.
    """

    statistics_batch_size: int | None
    positions: int
    activates: bool


def _mabn(norm: _BatchNorm, place: Place) -> nn.Module:
    return MovingAverageNorm(norm.num_features, norm.eps, statistics_batch_size=place.statistics_batch_size)


def _gn_ws(norm: _BatchNorm, _: Place) -> nn.Module:
    return nn.GroupNorm(_groups(norm), norm.num_features, norm.eps)


def _online(norm: _BatchNorm, _: Place) -> nn.Module:
    return OnlineNorm(norm.num_features, norm.eps)


def _frn(norm: _BatchNorm, place: Place) -> nn.Module:
    alone = place.positions == 1
    return FilterResponseNorm(norm.num_features, norm.eps, learns_eps=alone, activates=place.activates)


def _evonorm(norm: _BatchNorm, _: Place) -> nn.Module:
    return EvoNorm(norm.num_features, norm.eps, groups=_groups(norm))


def _frozen(norm: _BatchNorm, _: Place) -> nn.Module:
    return FrozenNorm(norm.num_features, norm.eps, norm.momentum)


def _reference(norm: _BatchNorm, _: Place) -> nn.Module:
    return ReferenceNorm(norm.num_features, norm.eps)


def _iternorm(norm: _BatchNorm, place: Place) -> nn.Module:
    size, block = place.statistics_batch_size, _groups(norm)
    return IterativeNorm(norm.num_features, norm.eps, norm.momentum, statistics_batch_size=size, block=block)


def _gkn(norm: _BatchNorm, _: Place) -> nn.Module:
    return GroupKalmanNorm(_groups(norm), norm.num_features, norm.eps)


def _normprop(norm: _BatchNorm, place: Place) -> nn.Module:
    return NormalizationPropagation(norm.num_features, norm.eps, activates=place.activates)


def _cbn(norm: _BatchNorm, place: Place) -> nn.Module:
    size = place.statistics_batch_size
    return CrossIterationNorm(norm.num_features, norm.eps, norm.momentum, statistics_batch_size=size)


def _groups(norm: _BatchNorm) -> int:
    return math.gcd(8, norm.num_features)


BUILDERS: dict[str, Callable[[_BatchNorm, Place], nn.Module]] = {
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


def rival_layer(norm: _BatchNorm, kind: str, place: Place) -> nn.Module:
    """Build a layer of a kind, with the old layer's γ, β and statistics where it has any.

    Args:
        norm: the old layer.
        kind: one of `BUILDERS`.
        place: where it stands.
    """
    layer = BUILDERS[kind](norm, place)
    held = norm.weight if norm.weight is not None else norm.running_mean
    if held is not None:
        layer = layer.to(held.device, held.dtype)
    inherit(norm, layer)
    if isinstance(layer, MovingAverageNorm | IterativeNorm | NormalizationPropagation):
        layer.take_over_(norm)
    return layer
