"""Reading finished runs as the cells of a comparison, and saying what makes them hard to compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bkn_core.compare.cells import Cell, finished_cell, flat_keys
from bkn_core.engine.run_folder import RunFolder
from bkn_core.errors import InputError, RecipeError
from bkn_core.recipe import Recipe

# These change neither what is learned nor what it is compared with.
_IMMATERIAL = {"version", "name", "batch.per_device", "data.download", "train.device", "train.seed", "train.workers"}
_COMPARED = {"norm.kind", "batch.gradient", "batch.statistics"}


def read_runs(paths: Sequence[Path]) -> tuple[list[Cell], list[str]]:
    """Return the cells of finished runs, and warnings where their recipes differ in more than the normalization.

    Raises:
        InputError: there is no run, or one is missing or not finished.
    """
    folders = [RunFolder.open(path) for path in dict.fromkeys(paths)]
    if not folders:
        raise InputError("there is no run to compare", "Give the folders of finished runs, or a recipe.")
    for folder in folders:
        if (status := folder.status) != "finished":
            finish = "Let it end" if status == "running" else f"Finish it with `bkn train --resume {folder.path}`"
            raise InputError(f"{folder.path} is not finished: it is {status}", f"{finish}, or leave it out.")
    recipes = [folder.recipe for folder in folders]
    refuse_masks(recipes)
    cells = [finished_cell(folder, recipe) for folder, recipe in zip(folders, recipes, strict=True)]
    variants = _variants(recipes)
    cells = [dataclasses.replace(cell, variant=variant) for cell, variant in zip(cells, variants, strict=True)]
    return cells, [*_differences(recipes), *_repetitions(cells)]


def refuse_masks(recipes: Sequence[Recipe]) -> None:
    """Refuse to compare what has no top-1.

    Raises:
        RecipeError: naming the task.
    """
    for task in {recipe.task for recipe in recipes} - {"classification"}:
        raise RecipeError(f"the task is {task}: only classifiers are compared", "Train each kind: norm.kind=bn ...")


def _material(recipe: Recipe) -> dict[str, Any]:
    keys = flat_keys(recipe).items()
    return {key: value for key, value in keys if key not in _IMMATERIAL and not key.startswith(("eval.", "log."))}


def _variants(recipes: Sequence[Recipe]) -> list[str]:
    """Return, for each run, the keys in which it differs from others of the same norm and batch sizes."""
    groups: dict[tuple[object, ...], list[dict[str, Any]]] = {}
    materials = [_material(recipe) for recipe in recipes]
    places = [tuple(material[key] for key in sorted(_COMPARED)) for material in materials]
    for place, material in zip(places, materials, strict=True):
        groups.setdefault(place, []).append(material)
    return [
        ", ".join(
            f"{key}={value}" for key, value in material.items() if any(other[key] != value for other in groups[place])
        )
        for place, material in zip(places, materials, strict=True)
    ]


def _differences(recipes: Sequence[Recipe]) -> list[str]:
    materials = [_material(recipe) for recipe in recipes]
    warnings = []
    for key in materials[0]:
        values = list(dict.fromkeys(str(material[key]) for material in materials))
        if len(values) > 1 and key not in _COMPARED and not key.startswith("norm."):
            warnings.append(f"the runs differ in {key}: {', '.join(values)}")
    return warnings


def _repetitions(cells: Sequence[Cell]) -> list[str]:
    """Name runs that are the same seed of the same recipe: they are no independent samples."""
    seen: dict[tuple[object, ...], Path] = {}
    warnings = []
    for cell in cells:
        key = (cell.norm, cell.gradient, cell.statistics, cell.variant, cell.seed)
        if key in seen:
            warnings.append(f"{seen[key]} and {cell.run} are the same recipe and seed")
        seen.setdefault(key, cell.run)
    return warnings
