"""From a recipe to those of a matrix of norms, statistics batch sizes and seeds."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from bkn_core.errors import RecipeError
from bkn_core.kinds import GROUPLESS, POPULATION_ONLY
from bkn_core.recipe import BatchConfig, NormConfig, Recipe, dump_recipe, load_recipe

Load = Callable[[Sequence[str]], Recipe]


def recipe_loader(source: str | Path | Recipe | None, overrides: Sequence[str]) -> Load:
    """Return a function from further KEY=VALUE words to the recipe under them."""
    if not isinstance(source, Recipe):
        return lambda words: load_recipe(source, [*overrides, *words])

    def load(words: Sequence[str]) -> Recipe:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.yaml"
            path.write_text(dump_recipe(source), encoding="utf-8")
            return load_recipe(path, [*overrides, *words])

    return load


def plan_recipes(
    load: Load, *, norms: Sequence[str], statistics_batch_sizes: Sequence[int] | None, seeds: int | Sequence[int]
) -> list[Recipe]:
    """Return the recipe of every cell, all of a seed before the next.

    Raises:
        RecipeError: an axis of the matrix is empty, or one of its values does not exist or fit.
    """
    base = load(())
    if base.norm.kind not in norms and base.norm.kind != NormConfig().kind:
        raise RecipeError(
            f"norm.kind is {base.norm.kind!r}, which is none of the norms to compare ({', '.join(norms)})",
            f"Name it there: --norms {','.join([*norms, base.norm.kind])}.",
        )
    sizes = _sizes(base, statistics_batch_sizes)
    numbers = range(base.train.seed, base.train.seed + seeds) if isinstance(seeds, int) else dict.fromkeys(seeds)
    if not norms or not numbers:
        raise RecipeError("there is nothing to compare: no norm or no seed", "Give at least one of each.")
    return [
        load(_words(base, norm, size, seed))
        for seed in numbers
        for norm in dict.fromkeys(norms)
        for size in (sizes[:1] if norm in GROUPLESS else sizes)
    ]


def _words(base: Recipe, norm: str, statistics: int, seed: int) -> list[str]:
    stats = "population" if norm in POPULATION_ONLY else "both"
    return [
        f"norm.kind={norm}",
        f"batch.gradient={base.batch.gradient}",
        f"batch.statistics={statistics}",
        f"batch.per_device={_per_device(base.batch, statistics)}",
        f"train.seed={seed}",
        f"eval.stats={stats}",
        "log.plots=false",
    ]


def _per_device(batch: BatchConfig, statistics: int) -> str:
    """Keep the images per pass that the user chose, where they make whole groups of another size."""
    automatic = BatchConfig(gradient=batch.gradient, statistics=batch.statistics).per_device
    is_kept = batch.per_device != automatic and batch.per_device % statistics == 0
    return str(batch.per_device) if is_kept else "null"


def _sizes(base: Recipe, wanted: Sequence[int] | None) -> list[int]:
    gradient = base.batch.gradient
    if wanted is None:
        return [size for size in dict.fromkeys((2, gradient)) if gradient % size == 0]
    sizes = list(dict.fromkeys(wanted))
    if not sizes or min(sizes) < 1:
        raise RecipeError(f"statistics_batch_sizes is {sizes}; give integers of at least 1")
    for size in sizes:
        if gradient % size:
            multiple = math.lcm(*sizes)
            fitting = -(-gradient // multiple) * multiple
            raise RecipeError(
                f"the statistics batch size {size} does not divide batch.gradient, which is {gradient}",
                f"Add batch.gradient={fitting}, or leave this size out.",
            )
    return sizes
