"""The tasks by the names that recipes give them."""

from __future__ import annotations

from bkn_core.engine.tasks.classification import Classification
from bkn_core.engine.tasks.segmentation import Segmentation
from bkn_core.engine.tasks.task import Task
from bkn_core.recipe import Recipe

_TASKS: dict[str, Task] = {"classification": Classification(), "segmentation": Segmentation()}


def task_of(recipe: Recipe) -> Task:
    """Return what a recipe's network learns."""
    return _TASKS[recipe.task]
