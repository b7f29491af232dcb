"""Which form of the filter normalizes a batch."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from bkn_core.filter.inflation_gradient import Sensitivity
from bkn_core.filter.kalman import Gaussian, moments
from bkn_core.filter.state import FilterSettings
from bkn_core.ops.covariance import matrix_normalize, normalize_by
from bkn_core.ops.normalize import Filtered, kalman_normalize
from bkn_core.ops.synchronized import joint_normalize


def normalize_batch(
    x: Tensor,
    prior: Gaussian | None,
    parameters: tuple[Tensor, Tensor | None, Tensor | None],
    settings: FilterSettings,
    sensitivity: Sensitivity | None = None,
    processes: tuple[ProcessGroup | None] | None = None,
) -> Filtered:
    """Normalize a batch by the posterior of each of its groups.

    Args:
        x: activations.
        prior: µ', v'; None is batch normalization.
        parameters: gain, γ and β; taken in the type of the gain.
        settings: see `FilterSettings`.
        sensitivity: of the layer, where the gradient follows its inflations.
        processes: the group that all of x is a part of, in a tuple; None where x is observed by itself.

    Shape:
        x (N, C, *spatial), prior (C,) or (G, C).
    """
    gain, weight, bias = parameters
    weight, bias = (None if t is None else t if t.dtype is gain.dtype else t.to(gain.dtype) for t in (weight, bias))
    if processes is not None:
        form = processes[0], settings.is_matrix
        return joint_normalize(x, prior, (gain, weight, bias), settings, form, sensitivity)
    images, size = x.shape[0], settings.statistics_batch_size
    if sensitivity is not None and size is not None and images % min(size, images):
        return normalize_by(x, prior, moments(x, size), (gain, weight, bias), settings, sensitivity)
    normalize = matrix_normalize if settings.is_matrix else kalman_normalize
    return normalize(x, prior, gain, weight, bias, settings, sensitivity)
