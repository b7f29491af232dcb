"""Validation images for the choice of a learning rate, where a recipe has none."""

from __future__ import annotations

from bkn_core.compare.plan import Load
from bkn_core.data.splits import DataSplits
from bkn_core.engine.build import load_splits
from bkn_core.errors import BknError, RecipeError

_SHARE = 0.1


def hold_out(load: Load) -> tuple[Load, list[str]]:
    """Return a loader whose recipes hold out a tenth of the training images where they have no validation images.

    The images are always the same ones, in proportion to the classes.

    Args:
        load: of a recipe.

    Returns:
        The loader, and what the user should know of it.
    """
    recipe = load(())
    try:
        if recipe.data.validation is not None or load_splits(recipe).validation is not None:
            return load, []
        words, splits = _held_out(load)
    except BknError:  # its runs will say so
        return load, []
    return lambda more: load([*words, *more]), [
        f"{recipe.name} has no validation images: learning rates are chosen on {len(splits.deciding)} of its training "
        f"images ({words[0]}), and {len(splits.train)} are trained on"
    ]


def _held_out(load: Load) -> tuple[list[str], DataSplits]:
    words = [f"data.validation={_SHARE}"]
    try:
        return words, load_splits(load(words))
    except RecipeError:  # data.train_images counts nearly all there are
        words.append("data.train_images=null")
        return words, load_splits(load(words))
