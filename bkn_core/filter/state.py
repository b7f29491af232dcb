"""What a layer sees in a forward and what it remembers of forwards, as values: tensors by their names."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from bkn_core.filter.kalman import Gaussian


class FilterSettings(NamedTuple):
    """What the filter needs to know beside tensors.

    Args:
        eps: ε.
        statistics_batch_size: images per statistics group.
        guard_limit: by how much a prior may exceed what is observed.
        momentum: weight α of the newest posterior in the moving statistics; None is the cumulative average.
        is_matrix: observe the full covariance matrix S.
    """

    eps: float
    statistics_batch_size: int | None = None
    guard_limit: float = math.inf
    momentum: float | None = 0.1
    is_matrix: bool = False


class FilterStatistics(NamedTuple):
    """What the filter makes of each group and channel: one tensor, as kernels write it, and the names of its parts.

    Shape:
        packed (6, G, C): µ̂, v̂ (differentiable: later layers may predict from them), x̄, S, the unbiased v̂ + q S / (n-1)
        for moving averages, and r = (v̂ + ε)^-½.
    """

    packed: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean of the posterior, (G, C)."""
        return self.packed[0]

    @property
    def variance(self) -> Tensor:
        """The variance of the posterior, (G, C)."""
        return self.packed[1]

    @property
    def observed(self) -> Gaussian:
        """What was observed, (G, C) each, as constants."""
        constants = self.packed.detach()
        return Gaussian(constants[2], constants[3])

    @property
    def moving(self) -> Tensor:
        """What moving averages average: mean and unbiased variance, (2, G, C)."""
        return self.packed[0::4]

    @property
    def groups(self) -> int:
        """The number of groups."""
        return self.packed.shape[1]

    def detach(self) -> FilterStatistics:
        """Return the same without its graph."""
        return FilterStatistics(self.packed.detach())


class LayerState(NamedTuple):
    """What a layer remembers: tensors that are moved in place, None where it has none, as `cpu/track.h` reads them.

    Shape:
        inflation (of the variance, as a logarithm) and mean_inflation (in standard deviations) (C,); sensitivity (2, C)
        and gathered (3, C), see `inflation_gradient.py`; residual (2, C) and uncertainty (5,), see `uncertainty.py`;
        gain (), where it is computed; running_mean and running_var (C,); batches (). `past`, which tells layers apart,
        holds both inflations as they were before the last forward moved them, for a checkpoint that runs it again.
    """

    inflation: Tensor | None
    mean_inflation: Tensor | None
    sensitivity: Tensor | None
    residual: Tensor | None
    gathered: Tensor | None
    uncertainty: Tensor | None
    gain: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batches: Tensor | None
    past: list[tuple[Tensor, Tensor]]


class Observation(NamedTuple):
    """What a layer saw in a forward, and what it remembers.

    Args:
        state: moves towards what was seen.
        prior: refined.
        statistics: of the filter.
        images: how many; a tensor where they are those of several processes.
        settings: of the filter.
        share: the part of the images that each group holds, (G, 1), where several forwards of different sizes are one;
            else None.
    """

    state: LayerState
    prior: Gaussian | None
    statistics: FilterStatistics
    images: int | Tensor
    settings: FilterSettings
    share: Tensor | None = None

    @property
    def is_inflated(self) -> bool:
        """Whether there was a prior, whose inflations move."""
        return self.prior is not None and self.state.inflation is not None

    @property
    def is_even(self) -> bool:
        """Whether all groups hold as many images."""
        size, images = self.settings.statistics_batch_size, self.images
        return self.share is None and (isinstance(images, Tensor) or size is None or images % min(size, images) == 0)
