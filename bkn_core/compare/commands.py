"""The command that repeats a run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from bkn_core.compare.cells import flat_keys
from bkn_core.errors import BknError
from bkn_core.recipe import Recipe, load_recipe, shipped_recipes


def command(recipe: Recipe, run: Path) -> str:
    """Return the words of `bkn train` that give a recipe, on any machine; where none do, those that read the run's."""
    base = recipe.name if recipe.name in shipped_recipes() else None
    try:
        plain = flat_keys(load_recipe(base))
        words = [
            f"{key}={_yaml(value)}" for key, value in flat_keys(recipe).items() if value != plain[key] and "." in key
        ]
        if flat_keys(load_recipe(base, words)) == flat_keys(recipe):
            return shlex.join(["bkn", "train", *([base] if base else []), *words])
    except BknError:
        pass  # a text that no word can hold, say
    return shlex.join(["bkn", "train", str(run / "config.yaml")])


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()
