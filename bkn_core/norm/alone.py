"""A layer that is given its prior by hand: what it does to small vectors, and the rest, in one call of C++.

In a converted model that is done for all layers at once, see `wiring`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bkn_core.norm import compiled_node, following
from bkn_core.norm.fused import Filtered
from bkn_core.norm.kalman import Gaussian

if TYPE_CHECKING:
    from bkn_core.norm.layers import BatchKalmanNorm


def filter_alone(layer: BatchKalmanNorm, x: Tensor, prior: Gaussian) -> Filtered | None:
    """Refine a prior, normalize by it and remember what was seen, in training; None where C++ cannot do it.

    What activation checkpointing runs again in the backward pass is not remembered.

    Args:
        layer: with a learned gain, an innovation and moving statistics, and without a learned correction.
        x: activations.
        prior: a constant, for all groups.
    """
    own, known, size = layer._buffers, layer._parameters, layer.statistics_batch_size  # faster than attributes
    operations = None if torch.compiler.is_compiling() else compiled_node.node()
    momentum, innovation, running = layer.momentum, own["innovation"], own["running_mean"]
    if operations is None or momentum is None or innovation is None or running is None:
        return None
    if layer.covariance == "full" or layer.guarded or (layer.synchronized and size is None):
        return None
    if "gain_logit" not in known or "prior_offset" in known or "weight" not in known or "bias" not in known:
        return None
    learned = known["gain_logit"], own["gain_factor"], known["weight"], known["bias"]
    moved = innovation, own["sensitivity"], own["newest_sensitivity"], running, own["running_var"]
    numbers = layer.eps, momentum, layer.innovation_momentum, following.IMAGES
    remembered = (*moved, own["num_batches_tracked"])
    if not compiled_node.are_plain((x, *prior, *learned)):  # a class of its own would spread to what is remembered
        return None
    made = operations.alone(x, *prior, *learned, layer.innovation_then, remembered, numbers, size or 0)
    if len(made) == 3:
        layer.__dict__["innovation_then"] = made[2]
    return Filtered(made[0], made[1]) if made else None
