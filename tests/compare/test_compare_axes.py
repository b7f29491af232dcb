"""What a comparison varies: its options before words, words before the recipe's section `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bkn_core.compare.axes import plan_matrix
from bkn_core.compare.cells import flat_keys
from bkn_core.compare.commands import command
from bkn_core.compare.matrix import compare
from bkn_core.engine.checkpoint import deciding_keys
from bkn_core.recipe import CompareConfig, Recipe, load_recipe

SMALL = (
    "version: 1\nbatch: {gradient: 64}\noptim: {lr: 0.1}\n"
    "compare: {norms: [gn, bn], gradient_batch_sizes: [64, 16], statistics_batch_sizes: [64, 2], seeds: 2}\n"
)


OTHER = {
    "norms": "[ln]",
    "statistics_batch_sizes": "[8]",
    "gradient_batch_sizes": "[128, 32]",
    "models": "[cifar_plain]",
    "learning_rates": "[0.3]",
    "learning_rate_power": "0.5",
    "seeds": "3",
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def places(recipes: list[Recipe]) -> list[tuple[str, int, int]]:
    return [(r.norm.kind, r.batch.gradient, r.batch.statistics) for r in recipes]


def planned(source: Path | str, *words: str, **asked: Any) -> list[Recipe]:
    return plan_matrix([source], words, asked)[0]


def test_a_recipe_says_what_is_compared(small: Path) -> None:
    recipes, notes = plan_matrix([small], (), {"norms": None})
    cells = [("gn", 64, 64), ("bn", 64, 64), ("bn", 64, 2), ("gn", 16, 2), ("bn", 16, 2)]
    assert places(recipes) == cells * 2 and [r.train.seed for r in recipes] == [0] * 5 + [1] * 5
    assert notes == ["s = 64 with g = 16 is left out: whole groups do not make 16 images"]


@pytest.mark.parametrize("key", CompareConfig.model_fields)
def test_another_value_of_a_key_makes_another_comparison(key: str, small: Path) -> None:
    own, other = planned(small), planned(small, f"compare.{key}={OTHER[key]}")
    assert [*map(flat_keys, own)] != [*map(flat_keys, other)]


def test_options_come_before_the_recipe_and_the_rest_stays(small: Path) -> None:
    assert places(planned(small, norms=["bkn"], seeds=1)) == [("bkn", 64, 64), ("bkn", 64, 2), ("bkn", 16, 2)]


@pytest.mark.parametrize(
    ("words", "cells"),
    [
        (["batch.gradient=8"], [("bn", 8, 2)]),  # 64 makes no whole groups of eight images
        (["batch.statistics=4"], [("bn", 64, 4), ("bn", 16, 4)]),
        (["batch.statistics=4", "batch.gradient=8"], [("bn", 8, 4)]),
    ],
)
def test_a_word_leaves_an_axis_its_value_alone(
    words: list[str], cells: list[tuple[str, int, int]], small: Path
) -> None:
    assert places(planned(small, *words, norms=["bn"], seeds=1)) == cells


def test_a_model_and_a_rate_in_words_leave_those_of_the_recipe_out(small: Path) -> None:
    small.write_text(SMALL.replace("seeds: 2", "models: [cifar_plain, cifar_resnet8], learning_rates: [0.2]"))
    recipes = planned(small, "model.name=cifar_resnet20", "optim.lr=0.3", norms=["gn"])
    assert {(r.model.name, r.optim.lr) for r in recipes} == {("cifar_resnet20", 0.3)}


def test_a_comparison_without_options_is_what_the_recipe_says(small: Path, tmp_path: Path) -> None:
    few = ["train.epochs=1", "data.train_images=16", "data.test_images=8", "data.image_size=8", "batch.gradient=16"]
    words = [*few, "model.name=cifar_plain", "train.device=cpu"]
    cells = compare(small, words, seeds=1, out=tmp_path / "out").cells
    assert [(cell.norm, cell.gradient, cell.statistics, cell.status) for cell in cells] == [
        ("gn", 16, 2, "finished"),
        ("bn", 16, 2, "finished"),
    ]


def test_learning_rates_follow_the_images_of_a_step_by_a_power(small: Path) -> None:
    small.write_text(SMALL.replace("seeds: 2", "learning_rate_power: 0.5"))
    rates = {(r.batch.gradient, r.optim.lr) for r in planned(small, norms=["gn"])}
    assert rates == {(64, 0.1), (16, 0.05)}
    rates = {(r.batch.gradient, r.optim.lr) for r in planned(small, norms=["gn"], learning_rates=[0.3])}
    assert rates == {(64, 0.3), (16, 0.15)}


def test_the_papers_matrix_is_one_command() -> None:
    recipes = planned("paper_cifar10")
    sizes = [(128, 128), (128, 2), (128, 1), (8, 2), (8, 1), (2, 2), (2, 1)]
    found = [(r.model.name, r.norm.kind, r.batch.gradient, r.batch.statistics) for r in recipes]
    models, norms = ("cifar_plain", "cifar_preact_resnet32"), ("bn", "brn", "bkn")
    assert sorted(found) == sorted((m, n, *pair) for m in models for n in norms for pair in sizes)
    assert {r.batch.gradient: r.optim.lr for r in recipes} == {128: 0.1, 8: 0.0144, 2: 0.00544}


def test_training_does_not_heed_what_is_compared(small: Path) -> None:
    own, other = load_recipe(small), load_recipe(small, ["compare.seeds=5", "compare.norms=[ln]"])
    assert own != other and deciding_keys(own) == deciding_keys(other)
    shown = command(planned("paper_cifar10", seeds=1)[0], Path("run"))
    assert shown.startswith("bkn train paper_cifar10 ") and "compare" not in shown
