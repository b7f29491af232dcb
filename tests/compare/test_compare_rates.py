"""Tests of the choice of a learning rate: by validation images alone, with its edge, told in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bkn_core.compare.cells import Cell
from bkn_core.compare.holdout import hold_out
from bkn_core.compare.matrix import compare
from bkn_core.compare.plan import recipe_loader
from bkn_core.compare.rates import choose_rates
from bkn_core.compare.summary import summarize
from bkn_core.engine.build import load_splits

TINY = ["data.train_images=64", "data.test_images=32", "data.image_size=8", "train.epochs=1", "train.device=cpu"]


def cell(rate: float, seed: int, validation: float, *, test: float = 0.5, loss: float = 1.0, norm: str = "bn") -> Cell:
    measured: dict[str, Any] = {"top1": {"population": test}, "validation": {"population": validation}}
    return Cell(
        norm, 32, 2, seed, "finished", Path(), learning_rate=rate, validation_loss={"population": loss}, **measured
    )


def test_a_rate_is_chosen_by_validation_images_whatever_the_test_images_say() -> None:
    cells = choose_rates([cell(0.1, 0, 0.8, test=0.9), cell(0.2, 0, 0.9, test=0.1), cell(0.4, 0, 0.7, test=1.0)])
    assert [one.chosen for one in cells] == [False, True, False]
    assert [one.top1 for one in cells] == [{}, {"population": 0.1}, {}]
    (row,) = summarize(cells)
    assert (row.learning_rate, row.edge, row.n, row.top1["population"].mean) == (0.2, "", 1, 0.1)
    assert [(rate.learning_rate, rate.validation) for rate in row.rates] == [(0.1, 0.8), (0.2, 0.9), (0.4, 0.7)]


def test_the_choice_is_of_the_mean_over_seeds_and_each_row_has_its_own() -> None:
    cells = [cell(0.1, 0, 0.9), cell(0.1, 1, 0.5), cell(0.2, 0, 0.8), cell(0.2, 1, 0.8)]
    cells += [cell(0.1, 0, 0.9, norm="gn"), cell(0.2, 0, 0.8, norm="gn")]
    rows = summarize(choose_rates(cells))
    assert [(row.norm, row.learning_rate, row.edge, row.n) for row in rows] == [
        ("bn", 0.2, "highest", 2),
        ("gn", 0.1, "lowest", 1),
    ]


def test_a_run_that_diverged_counts_as_nothing_learned_and_the_loss_decides_between_equals() -> None:
    diverged = Cell("bn", 32, 2, 1, "diverged", Path(), learning_rate=0.4)
    cells = [cell(0.1, 0, 0.8, loss=0.7), cell(0.1, 1, 0.8, loss=0.7), cell(0.2, 0, 0.8, loss=0.6)]
    cells += [cell(0.2, 1, 0.8, loss=0.6), cell(0.4, 0, 0.99), diverged]
    (row,) = summarize(choose_rates(cells))
    assert (row.learning_rate, row.unfinished) == (0.2, {})
    assert row.rates[2].unfinished == {"diverged": 1}


def test_a_tenth_of_the_training_images_is_held_out_where_there_are_no_validation_images() -> None:
    load, notes = hold_out(recipe_loader(None, ["data.train_images=500"]))
    splits = load_splits(load(()))
    assert splits.validation is not None
    assert notes == [
        f"digits_micro has no validation images: learning rates are chosen on {len(splits.validation)} of its training "
        "images (data.validation=0.1), and 500 are trained on"
    ]
    everything, _ = hold_out(recipe_loader(None, ["data.train_images=1437"]))
    assert everything(()).data.train_images is None
    own, none = hold_out(recipe_loader(None, ["data.validation=0.2"]))
    assert (own(()).data.validation, none) == (0.2, [])


def test_a_grid_of_rates_is_trained_with_the_same_held_out_images_and_goes_on(tmp_path: Path) -> None:
    axes: dict[str, Any] = {"norms": ["ln"], "learning_rates": [1e-5, 0.1], "out": tmp_path}
    result = compare(None, [*TINY, "batch.gradient=32"], **axes)
    assert [one.run.name for one in result.cells] == ["ln-g32-s2-lr1e-05-seed0", "ln-g32-s2-lr0.1-seed0"]
    (row,) = result.summary
    best = max(result.cells, key=lambda one: (one.validation["population"], -one.validation_loss["population"]))
    assert row.learning_rate == best.learning_rate and best.chosen
    assert [bool(one.top1) for one in result.cells] == [one.chosen for one in result.cells]
    assert "data.validation=0.1" in result.warnings[0]
    text = result.artifacts["table"].read_text()
    assert f"({row.edge} tried)" in text and "a better one may lie beyond" in text
    assert json.loads(result.artifacts["json"].read_text())["summary"][0]["edge"] == row.edge
    again = compare(None, [*TINY, "batch.gradient=32"], **axes)
    assert [one.seconds for one in again.cells] == [one.seconds for one in result.cells]


@pytest.mark.parametrize("count", [2, 3])
def test_equal_rates_are_one(count: int) -> None:
    rates = np.full(count, 0.1).tolist()
    (row,) = summarize(choose_rates([cell(rate, seed, 0.8) for seed, rate in enumerate(rates)]))
    assert (row.rates, row.edge, row.n) == ((), "", count)
