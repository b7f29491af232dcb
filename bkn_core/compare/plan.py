"""From recipes to the cells of a matrix of norms, batch sizes, learning rates, models and seeds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bkn_core.errors import RecipeError
from bkn_core.kinds import GROUPLESS, POPULATION_ONLY
from bkn_core.recipe import BatchConfig, NormConfig, Recipe, dump_recipe, load_recipe

Load = Callable[[Sequence[str]], Recipe]


@dataclasses.dataclass(frozen=True)
class Planned:
    """A cell before it is run.

    Args:
        recipe: of its run.
        name: of its folder.
        names: its recipe and model, where several are compared.
        more: these and its learning rate in words, where there are several.
    """

    recipe: Recipe
    name: str
    names: dict[str, str]
    more: str = ""


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


def plan_cells(recipes: Sequence[Recipe]) -> list[Planned]:
    """Name the cells of a matrix: `<norm>-g<g>-s<s>-seed<seed>`, with recipe, model and rate where there are several.

    Raises:
        RecipeError: two cells would have the same name.
    """
    several = {
        "recipe": len({recipe.name for recipe in recipes}) > 1,
        "model": len({recipe.model.name for recipe in recipes}) > 1,
        "rate": len({recipe.optim.lr for recipe in recipes}) > 1,
    }
    cells = [_planned(recipe, several) for recipe in recipes]
    name, count = Counter(cell.name for cell in cells).most_common(1)[0]
    if count > 1:
        raise RecipeError(f"{count} runs would be called {name}", "Give each recipe a name of its own (key name).")
    return cells


def plan_recipes(
    load: Load,
    *,
    norms: Sequence[str],
    statistics_batch_sizes: Sequence[int] | None,
    seeds: int | Sequence[int],
    gradient_batch_sizes: Sequence[int] | None = None,
    learning_rates: Sequence[float] | None = None,
    models: Sequence[str] | None = None,
    learning_rate_power: float = 0.0,
) -> list[Recipe]:
    """Return the recipe of every cell, all of a seed before the next.

    Raises:
        RecipeError: an axis of the matrix is empty, or one of its values does not exist or fit.
    """
    base = load(())
    _check_norm(base, norms)
    gradients = list(dict.fromkeys(gradient_batch_sizes or [base.batch.gradient]))
    sizes = {gradient: _sizes(gradient, gradients, statistics_batch_sizes) for gradient in gradients}
    numbers = range(base.train.seed, base.train.seed + seeds) if isinstance(seeds, int) else dict.fromkeys(seeds)
    if not norms or not numbers:
        raise RecipeError("there is nothing to compare: no norm or no seed", "Give at least one of each.")
    chosen = [f"model.name={json.dumps(model)}" for model in dict.fromkeys(models or ())] or [""]
    rates = list(dict.fromkeys(learning_rates or ())) or [base.optim.lr]
    return [
        load([*_words(base, norm, gradient, size, seed), f"optim.lr={rate!r}", *filter(None, (model,))])
        for seed, model, gradient, norm in itertools.product(numbers, chosen, gradients, dict.fromkeys(norms))
        for size in (sizes[gradient][:1] if norm in GROUPLESS else sizes[gradient])
        for rate in _rates(rates, gradient / base.batch.gradient, learning_rate_power)
    ]


def left_out(gradients: Sequence[int] | None, sizes: Sequence[int] | None) -> Iterator[str]:
    """Say which batch sizes of a matrix do not go together."""
    for gradient, size in itertools.product(dict.fromkeys(gradients or ()), dict.fromkeys(sizes or ())):
        if gradient % size:
            yield f"s = {size} with g = {gradient} is left out: whole groups do not make {gradient} images"


def _planned(recipe: Recipe, several: dict[str, bool]) -> Planned:
    batch = recipe.batch
    model = re.sub(r"[^\w.]+", "_", recipe.model.name)
    parts = [
        *([recipe.name] if several["recipe"] else []),
        *([model] if several["model"] else []),
        f"{recipe.norm.kind}-g{batch.gradient}-s{batch.statistics}",
        *([f"lr{recipe.optim.lr:g}"] if several["rate"] else []),
        f"seed{recipe.train.seed}",
    ]
    names = {"recipe": recipe.name, "model": recipe.model.name}
    shown = {key: name for key, name in names.items() if several[key]}
    rate = {"rate": f"lr {recipe.optim.lr:g}"} if several["rate"] else {}
    return Planned(recipe, "-".join(parts), shown, "".join(f", {word}" for word in {**shown, **rate}.values()))


def _check_norm(base: Recipe, norms: Sequence[str]) -> None:
    if base.norm.kind not in norms and base.norm.kind != NormConfig().kind:
        raise RecipeError(
            f"norm.kind is {base.norm.kind!r}, which is none of the norms to compare ({', '.join(norms)})",
            f"Name it there: --norms {','.join([*norms, base.norm.kind])}.",
        )


def _words(base: Recipe, norm: str, gradient: int, statistics: int, seed: int) -> list[str]:
    stats = "population" if norm in POPULATION_ONLY else "both"
    return [
        f"norm.kind={norm}",
        f"batch.gradient={gradient}",
        f"batch.statistics={statistics}",
        f"batch.per_device={_per_device(base.batch, gradient, statistics)}",
        f"train.seed={seed}",
        f"eval.stats={stats}",
        "log.plots=false",
    ]


def _rates(rates: Sequence[float], share: float, power: float) -> list[float]:
    """Return learning rates for a share of the recipe's images a step; three digits of those that are computed."""
    return [rate if share**power == 1 else float(f"{rate * share**power:.3g}") for rate in rates]


def _per_device(batch: BatchConfig, gradient: int, statistics: int) -> str:
    """Keep the images per pass that the user chose, where they make whole groups and batches of other sizes."""
    automatic = BatchConfig(gradient=batch.gradient, statistics=batch.statistics).per_device
    fits = batch.per_device % statistics == 0 and gradient % batch.per_device == 0
    return str(batch.per_device) if batch.per_device != automatic and fits else "null"


def _sizes(gradient: int, gradients: Sequence[int], wanted: Sequence[int] | None) -> list[int]:
    """Return the statistics batch sizes of a gradient batch size."""
    if min(gradients) < 1:
        raise RecipeError(f"gradient_batch_sizes is {gradients}; give integers of at least 1")
    if wanted is None:
        return [size for size in dict.fromkeys((2, gradient)) if gradient % size == 0]
    sizes = list(dict.fromkeys(wanted))
    if not sizes or min(sizes) < 1:
        raise RecipeError(f"statistics_batch_sizes is {sizes}; give integers of at least 1")
    fitting = [size for size in sizes if gradient % size == 0]
    useless = [size for size in sizes if all(other % size for other in gradients)]
    if useless or not fitting:
        size = useless[0] if useless else sizes[0]
        multiple = math.lcm(*sizes)
        better = -(-gradient // multiple) * multiple
        raise RecipeError(
            f"the statistics batch size {size} does not divide batch.gradient, which is {gradient}",
            f"Add batch.gradient={better}, or leave this size out.",
        )
    return fitting
