"""Tests of the recipes of a matrix."""

from __future__ import annotations

import pytest

from bkn_core.compare.plan import left_out, plan_cells, plan_recipes, recipe_loader
from bkn_core.errors import RecipeError
from bkn_core.recipe import Recipe, load_recipe

ORDINARY = {"norms": ["bn", "bkn"], "statistics_batch_sizes": None, "seeds": 1}


def places(recipes: list[Recipe]) -> list[tuple[str, int, int]]:
    return [(recipe.norm.kind, recipe.batch.statistics, recipe.train.seed) for recipe in recipes]


def test_the_default_sizes_are_two_and_the_whole_gradient_batch() -> None:
    recipes = plan_recipes(recipe_loader(None, ["batch.gradient=64"]), **ORDINARY)
    assert places(recipes) == [("bn", 2, 0), ("bn", 64, 0), ("bkn", 2, 0), ("bkn", 64, 0)]


def test_two_is_left_out_of_the_default_sizes_where_it_does_not_divide() -> None:
    load = recipe_loader(None, ["batch.gradient=15", "batch.statistics=3"])
    assert places(plan_recipes(load, **ORDINARY)) == [("bn", 15, 0), ("bkn", 15, 0)]


def test_a_number_of_seeds_counts_up_from_the_recipes_own() -> None:
    recipes = plan_recipes(recipe_loader(None, ["train.seed=7"]), **{**ORDINARY, "norms": ["ln"], "seeds": 3})
    assert places(recipes) == [("ln", 2, 7), ("ln", 2, 8), ("ln", 2, 9)]


def test_norms_that_look_at_no_group_are_run_once_per_seed() -> None:
    norms = ["gn", "ln", "in", "fixed", "none", "brn"]
    axes = {"norms": norms, "statistics_batch_sizes": [4, 8], "seeds": [5, 3]}
    counted = [norm for norm, _, _ in places(plan_recipes(recipe_loader(None, ()), **axes))]
    assert counted == ["gn", "ln", "in", "fixed", "none", "brn", "brn"] * 2


@pytest.mark.parametrize(
    ("chosen", "size", "expected"),
    [("null", 2, 128), ("null", 256, 256), ("64", 2, 64), ("64", 32, 64), ("64", 256, 256)],
)
def test_images_per_pass_are_kept_where_they_were_chosen_and_fit(chosen: str, size: int, expected: int) -> None:
    load = recipe_loader(None, ["batch.gradient=256", "batch.statistics=2", f"batch.per_device={chosen}"])
    (recipe,) = plan_recipes(load, norms=["bkn"], statistics_batch_sizes=[size], seeds=1)
    assert recipe.batch.per_device == expected


def test_automatic_images_per_pass_are_chosen_anew_for_every_size() -> None:
    load = recipe_loader(None, ["batch.gradient=256", "batch.statistics=256"])
    recipes = plan_recipes(load, norms=["bkn"], statistics_batch_sizes=[2, 256], seeds=1)
    assert [recipe.batch.per_device for recipe in recipes] == [128, 256]


@pytest.mark.parametrize(
    ("norm", "stats"), [("bkn", "both"), ("bn", "both"), ("gn", "both"), ("brn", "population"), ("fixed", "population")]
)
def test_a_cell_is_measured_in_every_way_its_norm_has(norm: str, stats: str) -> None:
    (recipe,) = plan_recipes(recipe_loader(None, ()), norms=[norm], statistics_batch_sizes=[2], seeds=1)
    assert (recipe.eval.stats, recipe.log.plots) == (stats, False)


def test_a_recipe_given_as_a_value_takes_overrides_and_keeps_the_rest() -> None:
    base = load_recipe(None, ["optim.lr=0.03", "train.epochs=3"])
    (recipe,) = plan_recipes(
        recipe_loader(base, ["train.epochs=2"]), norms=["gn"], statistics_batch_sizes=[2], seeds=[4]
    )
    assert (recipe.name, recipe.optim.lr, recipe.train.epochs, recipe.train.seed) == (base.name, 0.03, 2, 4)


def test_a_size_that_does_not_divide_the_gradient_batch_is_refused_with_one_that_all_divide() -> None:
    with pytest.raises(RecipeError, match=r"size 3 .* batch\.gradient, which is 128") as caught:
        plan_recipes(recipe_loader(None, ()), norms=["bn"], statistics_batch_sizes=[2, 3, 4], seeds=1)
    assert "batch.gradient=132" in caught.value.hint


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"norms": []}, "nothing to compare"),
        ({"seeds": 0}, "nothing to compare"),
        ({"seeds": []}, "nothing to compare"),
        ({"statistics_batch_sizes": []}, "at least 1"),
        ({"statistics_batch_sizes": [0]}, "at least 1"),
        ({"norms": ["bnk"]}, "did you mean 'bkn'"),
    ],
)
def test_an_axis_without_sense_is_refused(axes: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        plan_recipes(recipe_loader(None, ()), **{**ORDINARY, **axes})


def test_a_norm_that_the_recipe_forbids_is_refused_by_the_recipes_own_rule() -> None:
    load = recipe_loader(None, ["norm.kind=bn", "norm.gain=1.0", "norm.learn_gain=true"])
    with pytest.raises(RecipeError, match=r"norm\.gain is 1\.0"):
        plan_recipes(load, **ORDINARY)


def test_sizes_bend_for_the_whole_comparison_alike() -> None:
    load = recipe_loader(None, ["batch.statistics=3"])
    recipes = plan_recipes(load, norms=["bn"], statistics_batch_sizes=None, seeds=1)
    assert [(r.batch.gradient, r.batch.statistics) for r in recipes] == [(126, 2), (126, 126)]


def test_further_axes_are_multiplied_and_named_only_where_they_have_several_values() -> None:
    plain = plan_recipes(recipe_loader(None, ()), **{**ORDINARY, "norms": ["bn"]}, learning_rates=[0.1], models=None)
    assert [cell.name for cell in plan_cells(plain)] == ["bn-g128-s2-seed0", "bn-g128-s128-seed0"]
    axes = {"gradient_batch_sizes": [32, 64], "learning_rates": [0.05, 0.1], "models": ["cifar_resnet8", "timm:a/b"]}
    recipes = plan_recipes(recipe_loader(None, ()), **{**ORDINARY, "norms": ["gn", "bn"]}, **axes)
    cells = plan_cells(recipes)
    assert len(cells) == len({cell.name for cell in cells}) == 2 * 2 * (1 + 2) * 2
    assert [cell.name for cell in cells[:3]] == [
        "cifar_resnet8-gn-g32-s2-lr0.05-seed0",
        "cifar_resnet8-gn-g32-s2-lr0.1-seed0",
        "cifar_resnet8-bn-g32-s2-lr0.05-seed0",
    ]
    assert cells[-1].name == "timm_a_b-bn-g64-s64-lr0.1-seed0"
    assert (cells[-1].recipe.optim.lr, cells[-1].recipe.model.name) == (0.1, "timm:a/b")
    assert (cells[-1].names, cells[-1].more) == ({"model": "timm:a/b"}, ", timm:a/b, lr 0.1")


def test_sizes_that_do_not_go_together_are_left_out_and_named_where_each_has_its_place() -> None:
    axes = {"norms": ["bn"], "statistics_batch_sizes": [2, 24], "seeds": 1, "gradient_batch_sizes": [48, 64]}
    recipes = plan_recipes(recipe_loader(None, ()), **axes)
    assert [(r.batch.gradient, r.batch.statistics) for r in recipes] == [(48, 2), (48, 24), (64, 2)]
    assert list(left_out([48, 64], [2, 24])) == ["s = 24 with g = 64 is left out: whole groups do not make 64 images"]
    with pytest.raises(RecipeError, match=r"size 24 does not divide batch\.gradient"):
        plan_recipes(recipe_loader(None, ()), **{**axes, "gradient_batch_sizes": [64]})


def test_recipes_of_one_name_cannot_share_a_folder() -> None:
    recipes = plan_recipes(recipe_loader(None, ()), **{**ORDINARY, "norms": ["gn"]})
    with pytest.raises(RecipeError, match="2 runs would be called gn-g128-s2-seed0") as caught:
        plan_cells([*recipes, *recipes])
    assert "name of its own" in caught.value.hint
