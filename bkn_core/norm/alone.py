"""A layer that is given its prior by hand: what it does to small vectors, and the rest, in one call of C++.

In a converted model that is done for all layers at once, see `wiring`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from bkn_core.norm import compiled_node, following
from bkn_core.norm.fused import Filtered
from bkn_core.norm.handing import is_recomputation
from bkn_core.norm.kalman import Gaussian
from bkn_core.norm.nodes import is_eager
from bkn_core.norm.tracking import weight_of_newest

if TYPE_CHECKING:
    from bkn_core.norm.layers import BatchKalmanNorm


_LEARNED = frozenset(("gain_logit", "weight", "bias"))
_REMEMBERED = "sensitivity", "newest_sensitivity", "running_mean", "running_var", "num_batches_tracked"


def filter_alone(layer: BatchKalmanNorm, x: Tensor, prior: Gaussian) -> Filtered | None:
    """Refine a prior, normalize by it and remember what was seen, in training; None where C++ cannot do it.

    What activation checkpointing runs again in the backward pass is not remembered.

    Args:
        layer: with a learned gain, an innovation and moving statistics, and without a learned correction.
        x: activations.
        prior: a constant, for all groups.
    """
    own, known = layer._buffers, layer._parameters  # which are faster than attributes
    momentum, images, size = layer.momentum, x.shape[0], layer.statistics_batch_size
    groups, rest = divmod(images, min(size or images, images) or 1)
    remembers = own["innovation"] is not None and own["running_mean"] is not None and momentum is not None
    is_simple = layer.covariance == "diagonal" and not layer.guarded and not (layer.synchronized and size is None)
    if not groups or rest or not remembers or not is_simple or "prior_offset" in known or not _LEARNED.issubset(known):
        return None
    operations = compiled_node.node()
    if operations is None or not is_eager():
        return None
    is_again = is_recomputation()
    tensors = x, *prior, known["gain_logit"], own["gain_factor"], known["weight"], known["bias"]
    remembered = [layer.present_innovation if is_again else own["innovation"], *(own[name] for name in _REMEMBERED)]
    numbers = layer.eps, following.weight_of(images), weight_of_newest(layer.innovation_momentum, images), momentum
    made = compiled_node.are_plain(tensors) and operations.alone(*tensors, remembered, numbers, groups, not is_again)
    if not made:
        return None
    if not is_again:
        layer.__dict__["innovation_then"] = made[2]
    return Filtered(*made[:2])
