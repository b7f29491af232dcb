"""What a word of the command line asks for, where a recipe says something that cannot be beside it."""

from __future__ import annotations

from typing import Any

import pytest
from recipe_faults import faults

from bkn_core.recipe import load_recipe


@pytest.mark.parametrize(
    ("words", "key", "value", "note"),
    [
        (["batch.gradient=8"], "batch.per_device", 8, "is 8, not 64 ({}:1), to fit batch.gradient=8"),
        (["batch.statistics=3"], "batch.gradient", 126, "is 126, not 128 ({}:1), to fit batch.statistics=3"),
        (["batch.statistics=3"], "batch.per_device", 126, "is 126, not 64 ({}:1), to fit batch.statistics=3"),
        (
            ["batch.statistics=3", "batch.per_device=12"],
            "batch.gradient",
            120,
            "is 120, not 128 ({}:1), to fit batch.statistics=3",
        ),
        (["batch.statistics=200"], "batch.gradient", 200, "is 200, not 128 ({}:1), to fit batch.statistics=200"),
        (["norm.gain=1"], "norm.learn_gain", False, "is false, not true (the default), to fit norm.gain=1.0"),
        (["optim.momentum=0"], "optim.nesterov", False, "is false, not true (the default), to fit optim.momentum=0.0"),
    ],
)
def test_what_a_word_asks_for_bends_what_only_a_recipe_says(
    write: Any, caplog: pytest.LogCaptureFixture, words: list[str], key: str, value: object, note: str
) -> None:
    path = write("batch: {gradient: 128, per_device: 64}\n")
    recipe = load_recipe(path, words)
    section, _, name = key.partition(".")
    assert getattr(getattr(recipe, section), name) == value
    assert f"{key} {note.format(path)}" in caplog.messages


def test_a_size_that_fits_is_left_as_the_recipe_says(write: Any, caplog: pytest.LogCaptureFixture) -> None:
    recipe = load_recipe(write("batch: {gradient: 128, per_device: 4}\n"), ["batch.gradient=8", "batch.statistics=4"])
    assert (recipe.batch.per_device, caplog.messages) == (4, [])


def test_rule_keeps_silent_about_a_key_that_is_wrong_by_itself() -> None:
    assert "per_device" not in faults(None, "batch.per_device=6", "batch.statistics=x")
