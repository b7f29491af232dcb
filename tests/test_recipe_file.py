"""Recipes as files: parents, names, and what is missing."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
from recipe_faults import faults

from bkn_core.errors import InputError
from bkn_core.recipe import Recipe, dump_recipe, load_recipe, shipped_recipes

CORE = Path(__file__).parent.parent / "bkn_core"


def test_circle_of_parents_is_refused(write: Any) -> None:
    write("extends: mine.yaml\n", "base.yaml")
    path = write("version: 1\nextends: base.yaml\n")
    assert "extends leads in a circle: mine.yaml -> base.yaml -> mine.yaml" in faults(path)
    assert faults(path).startswith(f"{path.with_name('base.yaml')}:1: ")


def test_long_chain_of_parents_is_refused(write: Any) -> None:
    for number in range(9):
        path = write(f"extends: r{number - 1}.yaml\n" if number else "version: 1\n", f"r{number}.yaml")
    assert load_recipe(path.with_name("r7.yaml")).name == "r7"
    assert "through more than 8 files" in faults(path)


@pytest.mark.parametrize("value", ["[a.yaml, b.yaml]", "3", "null", '"a\\0"'])
def test_parent_that_is_no_path_is_refused(write: Any, value: str) -> None:
    assert "give the path of one YAML file" in faults(write(f"extends: {value}\n"))


def test_missing_parent_is_named_with_the_line_that_asks_for_it(write: Any) -> None:
    path = write("version: 1\nextends: gone.yaml\n")
    with pytest.raises(InputError, match=r"gone.yaml \(extends at .*mine.yaml:2\) does not exist"):
        load_recipe(path)


def test_parent_that_is_a_link_to_itself_is_an_input_error(write: Any, tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(InputError, match=r"loop\.yaml"):
        load_recipe(write("extends: loop.yaml\n"))


@pytest.mark.parametrize("source", ["gone.yaml", "gone/x", Path("gone"), "a\0.yaml", "x" * 5000 + ".yaml", "."])
def test_missing_file_is_an_input_error(source: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        load_recipe(source)


def test_unknown_bare_name_lists_the_shipped_ones_and_the_nearest() -> None:
    message = faults("digits_mirco")
    assert "(did you mean 'digits_micro'?)" in message
    assert all(name in message for name in shipped_recipes())
    assert "is no shipped recipe" in faults("x" * 5000)


def test_words_that_are_no_key_and_value_are_refused_with_a_hint() -> None:
    assert "write for example norm.kind=bn" in faults(None, "norm.kind")
    assert "extends is for files only" in faults(None, "extends=x.yaml")
    assert "not a key" in faults(None, "a.b.c.d=1")


def test_name_of_a_file_becomes_a_name_that_a_folder_can_have(write: Any) -> None:
    assert load_recipe(write("version: 1\n", "my recipe (1).yaml")).name == "my-recipe-1-"
    assert load_recipe(write("version: 1\nname: other\n")).name == "other"


def test_resolved_recipe_loads_to_an_equal_one(write: Any) -> None:
    words = [
        "name='07'",
        "data.root='1e3'",
        "data.image_size=[16, 8]",
        "norm.eps=1e-12",
        "model.args={a: '.5', b: null}",
    ]
    recipe = load_recipe(None, [*words, "data.augment=none", "batch.gradient=192", "eval.topk=[1]"])
    assert load_recipe(write(dump_recipe(recipe), "config.yaml")) == recipe
    assert Recipe.model_validate(recipe.model_dump()) == recipe


@pytest.mark.parametrize("path", [CORE / "kinds.py", *CORE.glob("recipe*.py")], ids=lambda path: path.stem)
def test_reading_recipes_needs_nothing_heavy(path: Path) -> None:
    tree = ast.parse(path.read_text())
    roots = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    ours = {
        "bkn_core",
        "bkn_core.errors",
        "bkn_core.kinds",
        *(f"bkn_core.{module.stem}" for module in CORE.glob("recipe*.py")),
    }
    light = {*sys.stdlib_module_names, "yaml", "pydantic", "pydantic_core"}
    assert {str(root).split(".")[0] for root in roots - ours} <= light
