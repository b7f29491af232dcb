"""The axes of a matrix: what the caller asks for, else what the recipe's section `compare` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bkn_core.compare.holdout import hold_out
from bkn_core.compare.plan import left_out, plan_recipes, recipe_loader
from bkn_core.recipe import Recipe


def plan_matrix(
    sources: Sequence[str | Path | Recipe | None], overrides: Sequence[str], asked: Mapping[str, Any]
) -> tuple[list[Recipe], list[str]]:
    """Return the recipe of every cell, and what the report is to say of the choice.

    Args:
        sources: recipes.
        overrides: KEY=VALUE words for them.
        asked: axes by name; None is the recipe's.

    Raises:
        RecipeError: an axis is empty, or one of its values does not exist or fit.
    """
    recipes: list[Recipe] = []
    notes: list[str] = []
    for source in sources:
        load = recipe_loader(source, overrides)
        axes = _axes(load(()), asked, overrides)
        notes += left_out(axes["gradient_batch_sizes"], axes["statistics_batch_sizes"])
        if len(set(axes["learning_rates"] or ())) > 1:
            load, more = hold_out(load)
            notes += more
        recipes += plan_recipes(load, **axes)
    return recipes, list(dict.fromkeys(notes))


def _axes(recipe: Recipe, asked: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return what is asked for, else the one value of a key that a word names, else the recipe's axes."""
    fixed = {
        "batch.gradient": ("gradient_batch_sizes", recipe.batch.gradient),
        "batch.statistics": ("statistics_batch_sizes", recipe.batch.statistics),
        "model.name": ("models", recipe.model.name),
        "optim.lr": ("learning_rates", recipe.optim.lr),
    }
    named = {word.partition("=")[0].strip() for word in overrides}
    words = {axis: (value,) for key, (axis, value) in fixed.items() if key in named}
    given = {axis: value for axis, value in asked.items() if value is not None}
    axes = {**dict(recipe.compare), **words, **given}
    if "statistics_batch_sizes" not in {**words, **given}:  # the recipe's own sizes, for other steps than its own
        gradients = axes["gradient_batch_sizes"] or (recipe.batch.gradient,)
        sizes = axes["statistics_batch_sizes"] or ()
        axes["statistics_batch_sizes"] = [n for n in sizes if any(g % n == 0 for g in gradients)] or None
    return axes
