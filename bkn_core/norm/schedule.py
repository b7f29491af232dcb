"""The gain over a training."""

from __future__ import annotations

from torch import nn

from bkn_core.norm.layers import BatchKalmanNorm

_ANNEALED = 0.9  # the part of training after which an annealed gain is 0


def anneal_gain_(model: nn.Module, progress: float) -> None:
    """Multiply the gain of every layer, in place, by a factor that falls from 1 to 0 over a training.

        q ← q · max(0, 1 - progress / 0.9)

    At the end layers are normalized by their priors alone, so batch and population statistics coincide.

    Args:
        model: a converted model.
        progress: the part of the training that is done, from 0 to 1.
    """
    for module in model.modules():
        if isinstance(module, BatchKalmanNorm):
            module.gain_factor.fill_(max(0.0, 1 - progress / _ANNEALED))
