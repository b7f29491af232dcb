"""What is wrong with a recipe, in the words that a user reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from bkn_core.errors import RecipeError
from bkn_core.recipe import load_recipe


def faults(source: str | Path | None, *overrides: str) -> str:
    """Return the message of a recipe that is refused."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    return caught.value.message


# Written out from the specification by hand, not read from the code.
