"""Tests of the statistics of paired runs, against SciPy, sums written out in float64, and made data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from bkn_core.compare.statistics import equivalence_p, paired_t, two_level_interval

OURS, THEIRS = [0.912, 0.905, 0.921, 0.899], [0.910, 0.907, 0.915, 0.901]


def test_the_paired_t_test_is_scipys() -> None:
    assert paired_t(OURS, THEIRS) == pytest.approx(scipy.stats.ttest_rel(OURS, THEIRS).pvalue, rel=1e-12)


def test_two_one_sided_tests_are_those_written_out() -> None:
    # d = 0.002, -0.002, 0.006, -0.002: mean 0.001, sum of squared deviations 4.4e-5, sd sqrt(4.4e-5 / 3).
    error = math.sqrt(4.4e-5 / 3) / 2
    above, below = (0.001 + 0.005) / error, (0.001 - 0.005) / error
    expected = max(1 - scipy.stats.t.cdf(above, 3), scipy.stats.t.cdf(below, 3))
    assert equivalence_p(np.subtract(OURS, THEIRS), 0.005) == pytest.approx(expected, rel=1e-9)


def test_equivalence_at_five_percent_is_the_ninety_percent_interval_inside_the_margin() -> None:
    random = np.random.default_rng(0)
    verdicts = set()
    for _ in range(40):
        differences = random.normal(0.002, 0.003, 5)
        low, high = scipy.stats.t.interval(0.9, 4, differences.mean(), scipy.stats.sem(differences))
        is_inside = low > -0.005 and high < 0.005
        p = equivalence_p(differences, 0.005)
        assert p is not None and (p < 0.05) == is_inside
        verdicts.add(is_inside)
    assert verdicts == {True, False}


@pytest.mark.parametrize("differences", [[0.003], [0.0, 0.0], [0.1 + 0.2, 0.3]])
def test_differences_without_a_spread_are_not_tested(differences: list[float]) -> None:
    assert equivalence_p(differences, 0.005) is None
    assert paired_t(differences, [0.0] * len(differences)) is None


def test_the_two_level_interval_of_one_seed_is_that_of_its_images() -> None:
    correct = np.random.default_rng(1).random((1, 400)) < 0.9
    expected = scipy.stats.bootstrap((correct[0],), np.mean, method="percentile", rng=2).confidence_interval
    assert two_level_interval(correct) == pytest.approx(tuple(expected), abs=0.004)


def test_the_two_level_interval_is_that_of_drawing_seeds_and_images_one_by_one() -> None:
    random = np.random.default_rng(3)
    correct = random.random((4, 150)) < np.array([0.7, 0.75, 0.9, 0.85])[:, None]
    seeds, images = random.integers(0, 4, (2000, 4)), random.integers(0, 150, (2000, 150))
    means = [correct[np.ix_(rows, columns)].mean() for rows, columns in zip(seeds, images, strict=True)]
    assert two_level_interval(correct) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.01)


def test_the_two_level_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random, covered = np.random.default_rng(4), 0
    for _ in range(200):
        accuracies = random.normal(0.8, 0.03, 8)  # of seeds, each measured on the same images, some of them harder
        hardness = random.normal(0, 0.1, 250)
        correct = random.random((8, 250)) < accuracies[:, None] + hardness
        low, high = two_level_interval(correct, 400)
        covered += low <= 0.8 <= high
    assert 0.88 <= covered / 200 <= 0.995
