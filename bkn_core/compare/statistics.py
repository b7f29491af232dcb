"""Statistics of paired runs as pure functions of arrays: which image each seed's model gets right, accuracy by seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 9999
_CONFIDENCE = 0.95
_LEVEL = 0.05
Correct = NDArray[np.bool_]


def paired_interval(ours: Correct, theirs: Correct) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean difference, images drawn in pairs.

    A difference takes few values, so that a resample is a draw of how often each occurs: the same distribution as
    drawing images one by one, at a cost that does not grow with them.

    Args:
        ours: which images each model gets right, (seeds, images).
        theirs: the same of the reference.
    """
    differences = (ours.astype(np.int64) - theirs).sum(0)
    values, counts = np.unique(differences, return_counts=True)
    images = len(differences)
    drawn = np.random.default_rng(0).multinomial(images, counts / images, size=RESAMPLES)
    return _quantiles(drawn @ values / (images * len(ours)))


def two_level_interval(correct: Correct, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the percentile bootstrap interval of mean accuracy, with seeds and images both drawn anew.

    All seeds share the images: a resample draws seeds, and images once for all of them. Images that the same seeds
    get right are one kind, so that a draw is of how often each kind occurs.

    Args:
        correct: which images each seed's model gets right, (seeds, images).
        resamples: how many draws.
    """
    random = np.random.default_rng(0)
    seeds, images = correct.shape
    kinds, counts = np.unique(correct, axis=1, return_counts=True)
    accuracies = random.multinomial(images, counts / images, size=resamples) @ kinds.T / images  # (resamples, seeds)
    drawn = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    return _quantiles((drawn * accuracies).sum(1) / seeds)


def mcnemar(ours: Correct, theirs: Correct) -> float:
    """Return the two-sided exact McNemar p of two models on the same images, (images,) each."""
    from scipy.stats import binomtest

    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    if only_ours + only_theirs == 0:
        return 1.0
    return float(binomtest(only_ours, only_ours + only_theirs).pvalue)


def paired_t(ours: ArrayLike, theirs: ArrayLike) -> float | None:
    """Return the two-sided p of a paired t test, or None where the differences are fewer than two or all equal.

    Args:
        ours: accuracy by seed, (seeds,).
        theirs: the same of the reference.
    """
    from scipy.stats import ttest_rel

    if not _varies(np.subtract(ours, theirs)):
        return None
    return float(ttest_rel(ours, theirs).pvalue)


def equivalence_p(differences: ArrayLike, margin: float) -> float | None:
    """Return the larger p of two one-sided t tests (TOST) that a mean lies above -margin and below margin.

    Args:
        differences: in pairs, (n,).
        margin: above 0, in the same unit.

    Returns:
        The p, or None where the differences are fewer than two or all equal.
    """
    from scipy.stats import ttest_1samp

    values = np.asarray(differences, np.float64)
    if not _varies(values):
        return None
    above = ttest_1samp(values, -margin, alternative="greater").pvalue
    below = ttest_1samp(values, margin, alternative="less").pvalue
    return float(max(above, below))


def is_significant(p: float) -> bool:
    """Say whether a p is below 0.05."""
    return p < _LEVEL


def _varies(differences: NDArray[np.float64]) -> bool:
    """Say whether a t test has a spread to go by: more than rounding makes of equal differences."""
    return len(differences) > 1 and float(np.ptp(differences)) > 1e-12


def _quantiles(means: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)
