"""Tests of the statistics over cells, against NumPy and SciPy."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from made_runs import make_run

from bkn_core.compare.cells import Cell
from bkn_core.compare.statistics import mcnemar, paired_interval
from bkn_core.compare.summary import compare_rows, summarize
from bkn_core.errors import InputError


def cell(norm: str, size: int, seed: int, top1: float) -> Cell:
    return Cell(norm, 32, size, seed, "finished", Path(), {"population": top1}, {"population": 1.0}, 100.0 + seed)


def test_a_row_has_the_mean_and_the_sample_deviation_of_its_seeds() -> None:
    values = [0.91, 0.93, 0.88]
    (row,) = summarize([cell("bn", 2, seed, value) for seed, value in enumerate(values)])
    assert row.n == 3
    assert row.top1["population"].mean == pytest.approx(np.mean(values))
    assert row.top1["population"].sd == pytest.approx(np.std(values, ddof=1))
    assert row.images_per_second == pytest.approx(101)


def test_a_single_seed_has_no_deviation() -> None:
    (row,) = summarize([cell("bn", 2, 0, 0.9)])
    assert row.top1["population"].mean == 0.9
    assert math.isnan(row.top1["population"].sd)


def test_failed_cells_count_in_no_mean_but_keep_their_row() -> None:
    failed = Cell("bn", 32, 1, 0, "failed", Path())
    rows = summarize([failed, cell("bn", 2, 0, 0.9), Cell("bn", 32, 2, 1, "diverged", Path())])
    assert [(row.statistics, row.n, list(row.top1)) for row in rows] == [(1, 0, []), (2, 1, ["population"])]


def test_the_paired_interval_is_scipys_percentile_bootstrap_of_the_differences() -> None:
    random = np.random.default_rng(3)
    ours, theirs = random.random((3, 400)) < 0.9, random.random((3, 400)) < 0.85
    differences = ours.mean(0) - theirs.mean(0)
    expected = scipy.stats.bootstrap((differences,), np.mean, method="percentile", rng=random).confidence_interval
    standard_error = differences.std() / math.sqrt(400)
    assert paired_interval(ours, theirs) == pytest.approx(tuple(expected), abs=0.1 * standard_error)


def test_the_interval_of_equal_models_is_zero() -> None:
    correct = np.arange(50)[None] % 3 == 0
    assert paired_interval(correct, correct) == (0.0, 0.0)


@pytest.mark.parametrize(("only_ours", "only_theirs"), [(1, 9), (9, 1), (5, 5), (0, 3)])
def test_mcnemar_is_the_exact_binomial_tail(only_ours: int, only_theirs: int) -> None:
    ours = np.array([True] * only_ours + [False] * only_theirs + [True] * 7 + [False] * 2)
    theirs = np.array([False] * only_ours + [True] * only_theirs + [True] * 7 + [False] * 2)
    n, most = only_ours + only_theirs, max(only_ours, only_theirs)
    tail = sum(math.comb(n, k) for k in range(most, n + 1)) / 2**n
    assert mcnemar(ours, theirs) == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_of_equal_models_is_one() -> None:
    correct = np.array([True, False])
    assert mcnemar(correct, correct) == 1.0


def test_the_reference_is_bn_with_the_most_images_else_the_first_row(tmp_path: Path) -> None:
    words = [("gn", 2), ("bn", 2), ("bn", 32), ("bkn", 32)]
    cells = [
        make_run(tmp_path / f"{norm}{size}", [f"norm.kind={norm}", f"batch.statistics={size}"]) for norm, size in words
    ]
    against_bn = compare_rows(summarize(cells), cells)
    assert [(c.row, c.reference) for c in against_bn] == [
        ("gn", "bn s=32"),
        ("bn s=2", "bn s=32"),
        ("bkn s=32", "bn s=32"),
    ]
    without = [cells[0], cells[3]]
    assert [(c.row, c.reference) for c in compare_rows(summarize(without), without)] == [("bkn s=32", "gn")]


def test_rows_are_compared_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    def run(norm: str, seed: int, accuracy: float) -> Cell:
        return make_run(tmp_path / f"{norm}{seed}", [f"norm.kind={norm}", f"train.seed={seed}"], accuracy=accuracy)

    cells = [run("bn", 0, 0.5), run("bn", 1, 0.6), run("bkn", 1, 0.9), run("bkn", 2, 0.1)]
    (comparison,) = compare_rows(summarize(cells), cells)
    expected = cells[2].top1["population"] - cells[1].top1["population"]
    assert comparison.seeds == (1,)
    assert comparison.difference == pytest.approx(expected)
    assert comparison.interval is not None
    assert comparison.interval[0] < expected < comparison.interval[1]
    assert list(comparison.p_values) == [1]


def test_rows_without_a_common_seed_are_not_compared(tmp_path: Path) -> None:
    cells = [make_run(tmp_path / "a", ["norm.kind=bn"]), make_run(tmp_path / "b", ["norm.kind=bkn", "train.seed=1"])]
    assert compare_rows(summarize(cells), cells) == []


def test_runs_measured_on_other_images_have_a_difference_but_no_paired_statistics(tmp_path: Path) -> None:
    cells = [make_run(tmp_path / norm, [f"norm.kind={norm}"]) for norm in ("bn", "bkn")]
    with np.load(tmp_path / "bkn" / "predictions.npz") as arrays:
        fewer = {name: array[:100] for name, array in arrays.items()}
    np.savez(tmp_path / "bkn" / "predictions.npz", **fewer)
    (comparison,) = compare_rows(summarize(cells), cells)
    assert comparison.interval is None
    assert comparison.p_values == {}


def test_a_run_whose_predictions_were_left_out_has_a_difference_but_no_paired_statistics(tmp_path: Path) -> None:
    cells = [make_run(tmp_path / norm, [f"norm.kind={norm}"]) for norm in ("bn", "bkn")]
    (tmp_path / "bkn" / "predictions.npz").unlink()
    (comparison,) = compare_rows(summarize(cells), cells)
    assert comparison.difference == cells[1].top1["population"] - cells[0].top1["population"]
    assert (comparison.interval, comparison.p_values, comparison.equivalence) == (None, {}, None)


def test_an_image_whose_loss_is_not_finite_is_a_mistake(tmp_path: Path) -> None:
    cells = [make_run(tmp_path / norm, [f"norm.kind={norm}"], accuracy=1.0) for norm in ("bn", "bkn")]
    with np.load(tmp_path / "bkn" / "predictions.npz") as arrays:
        changed = {name: array.copy() for name, array in arrays.items()}
    changed["population_losses"][:20] = np.nan
    np.savez(tmp_path / "bkn" / "predictions.npz", **changed)
    (comparison,) = compare_rows(summarize(cells), cells)
    assert comparison.p_values[0] == pytest.approx(2 / 2**20)


def test_damaged_predictions_are_named(tmp_path: Path) -> None:
    cells = [make_run(tmp_path / norm, [f"norm.kind={norm}"]) for norm in ("bn", "bkn")]
    path = tmp_path / "bkn" / "predictions.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"bkn.predictions\.npz cannot be read"):
        compare_rows(summarize(cells), cells)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_predictions_that_are_a_pipe_are_not_waited_for(tmp_path: Path) -> None:
    cells = [make_run(tmp_path / norm, [f"norm.kind={norm}"]) for norm in ("bn", "bkn")]
    path = tmp_path / "bkn" / "predictions.npz"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match=r"bkn.predictions\.npz cannot be read"):
        compare_rows(summarize(cells), cells)
