"""The gain over a training."""

from __future__ import annotations

from numbers import Real

from torch import nn

from bkn_core.errors import ConversionError
from bkn_core.layers.batch_kalman import BatchKalmanNorm

_HELD, _ANNEALED = 0.5, 0.9  # the parts of training until which an annealed gain is whole, and after which it is 0


def anneal_gain_(model: nn.Module, progress: float) -> None:
    """Multiply the gain of every layer, in place, by a factor that falls from 1 to 0 in the second half of a training.

        q ← q · min(1, max(0, (0.9 - progress) / 0.4))

    At the end layers are normalized by their priors alone, so batch and population statistics coincide.

    Args:
        model: a converted model.
        progress: the part of the training that is done, from 0 to 1.

    Raises:
        ConversionError: for another progress.
    """
    if not isinstance(progress, Real) or not 0 <= progress <= 1:
        raise ConversionError(f"progress is {progress!r}", "It must be between 0 and 1: step / steps.")
    for module in model.modules():
        if isinstance(module, BatchKalmanNorm):
            module.gain_factor.fill_(min(1.0, max(0.0, (_ANNEALED - progress) / (_ANNEALED - _HELD))))
