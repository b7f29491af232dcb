"""The shipped recipes, and any text that somebody may hand over as a recipe."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bkn_core.errors import BknError, InputError, RecipeError
from bkn_core.kinds import KINDS
from bkn_core.recipe import NormConfig, Recipe, dump_recipe, load_recipe, shipped_recipes

FOLDER = Path(__file__).parent.parent / "recipes"
FILES = sorted(FOLDER.glob("*.yaml"))
SECTIONS = ("model", "norm", "batch", "data", "train", "optim", "eval", "log", "compare")


def test_every_file_of_the_folder_is_a_shipped_recipe() -> None:
    assert shipped_recipes() == [path.stem for path in FILES]
    assert {"digits_micro", "cifar10_resnet_micro", "cifar10_resnet_micro_bn", "cifar10_smoke"} <= {*shipped_recipes()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_loads_by_path_and_by_name(path: Path) -> None:
    assert load_recipe(path) == load_recipe(path.stem)
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_header_tells_purpose_command_and_result(path: Path) -> None:
    purpose, command, result = path.read_text().splitlines()[:3]
    assert purpose.startswith("# Purpose: ")
    expected = r"# Command: bkn train" if path.stem == "digits_micro" else rf"# Command: bkn train {path.stem}( .*)?"
    assert re.fullmatch(expected, command)
    assert re.fullmatch(r"# Result: (see docs/results\.md|not run here: needs .+)", result)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_comes_back_from_its_resolved_form(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    (tmp_path / "config.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "config.yaml") == recipe


def test_the_pair_on_cifar10_differs_in_the_norm_alone() -> None:
    ours, baseline = load_recipe("cifar10_resnet_micro"), load_recipe("cifar10_resnet_micro_bn")
    assert (ours.norm.kind, baseline.norm.kind) == ("bkn", "bn")
    assert ours.model_dump(exclude={"name", "norm"}) == baseline.model_dump(exclude={"name", "norm"})


def test_smoke_recipe_is_one_epoch_of_few_images() -> None:
    smoke = load_recipe("cifar10_smoke")
    assert (smoke.train.epochs, smoke.data.train_images, smoke.data.test_images) == (1, 512, 256)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {root: !!python/object/apply:os.system ['true']}", "data.root has a tag (tag:yaml.org,2002:python/"),
        ("!!python/name:os.system x", "the recipe has a tag"),
        ("a: &a [x, x]\nb: *a", "b is an alias (*a)"),
        ("norm: &n {kind: bn}", "norm has an anchor (&n)"),
        ("norm: {kind: bn}\nnorm: {kind: gn}", "norm is given twice (first at"),
        ("norm: {eps: 1, eps: 1}", "norm.eps is given twice"),
        ("? [a]\n: b", "a key of the recipe is not text"),
        ("[" * 100_000, "nested more than 10 levels deep"),
        ("norm: " + "{norm: " * 1000, "nested more than 10 levels deep"),
        ("\n".join(f"k{i}: 1" for i in range(20_000)), "more than 10000 YAML elements"),
        ('name: "\\UFFFFFFFF"', "not valid YAML"),
        ('name: "\\ud800"', "half a character"),
        ("name: [", ":1: not valid YAML"),
        ("norm:\n\t kind: bn", ":2: not valid YAML"),
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("- 1", "the file holds [1]"),
        ("version: 1\n---\nversion: 1", ":2: a second YAML document"),
        (b"name: \xff", ":1: not UTF-8 text"),
        (b"#" * 1_000_001, "larger than 1000000 bytes"),
        (f"train: {{seed: {'9' * 5000}}}", "train.seed is inf"),
    ],
)
def test_hostile_text_is_refused(text: str | bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert expected in caught.value.message


def test_no_code_of_a_recipe_is_run(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
    with pytest.raises(RecipeError):
        load_recipe(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(InputError, match="is not a file"):
        load_recipe(tmp_path / "pipe.yaml")


KEYS = [key for section in SECTIONS for key in type(getattr(Recipe(), section)).model_fields]
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["auto", "bkn", "none"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner), max_leaves=6
)
keys = st.sampled_from(KEYS) | st.text(max_size=6)
trees = st.dictionaries(
    st.sampled_from([*SECTIONS, "version", "name", "extends"]) | st.text(max_size=6),
    st.dictionaries(keys, values, max_size=4) | values,
    max_size=5,
)
texts = st.one_of(
    trees.map(lambda tree: yaml.dump(tree, allow_unicode=True)),
    st.lists(
        st.sampled_from([*SECTIONS, *KEYS, *":{}[],-?&*!|>'\"#% \n\t", ": ", "\n  ", "!!int ", "&a ", "*a", "---\n"])
    ).map("".join),
    st.text(),
)


def outcome(source: Path | str | None, overrides: list[str]) -> str:
    """What loading comes to; anything but a recipe or a printable error of ours is let through and fails the test."""
    try:
        recipe = load_recipe(source, overrides)
    except BknError as error:
        assert all(line.isprintable() for line in error.message.split("\n"))
        return type(error).__name__
    assert isinstance(recipe, Recipe)
    return "Recipe"


@settings(deadline=None, max_examples=300)
@given(text=texts)
@example(text="a: &a [*a]")
@example(text="? ")
@example(text="norm: {kind: \ufeff}")
def test_any_text_is_a_recipe_or_refused(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert outcome(path, []) in ("Recipe", "RecipeError", "InputError")


@settings(deadline=None, max_examples=100)
@given(data=st.binary())
def test_any_bytes_are_a_recipe_or_refused(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz_bytes.yaml"
    path.write_bytes(data)
    assert outcome(path, []) in ("Recipe", "RecipeError")


characters = st.characters(codec=None)
words = st.one_of(
    st.text(characters),
    st.builds("{}.{}={}".format, st.sampled_from(SECTIONS) | st.text(max_size=4), keys, st.text(characters)),
    st.builds(lambda name, value: f"{name}={yaml.safe_dump(value)}", st.sampled_from([*SECTIONS, "name"]), values),
    st.builds("model.args.{}={}".format, st.text(max_size=4), scalars),
)


@settings(deadline=None, max_examples=300)
@given(overrides=st.lists(words, max_size=4))
@example(overrides=["norm.kind=\ud800", "\ud800=1", "name=\ud800"])
def test_any_words_are_a_recipe_or_refused(overrides: list[str]) -> None:
    assert outcome(None, overrides) in ("Recipe", "RecipeError")


@settings(deadline=None)
@given(source=st.text(characters))
def test_any_source_is_a_recipe_or_refused(source: str) -> None:
    assert outcome(source, []) in ("Recipe", "RecipeError", "InputError")


letters = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=9)
plain = st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.floats(allow_nan=False, allow_infinity=False)
valid: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "model": {"name": letters, "args": st.dictionaries(st.sampled_from(["a", "b_1", "On"]), plain | letters)},
    "norm": {
        "kind": st.sampled_from(KINDS),
        "gain": st.just("auto") | st.floats(1e-9, 0.999),
        "eps": st.floats(1e-300, 1e300),
        "learn_gain": st.booleans(),
    },
    "data": {
        "root": letters,
        "image_size": st.none() | st.integers(1, 512) | st.lists(st.integers(1, 512), min_size=2, max_size=2),
    },
    "train": {"seed": st.integers(0, 2**32 - 1), "amp": st.just("auto") | st.booleans(), "ema": st.floats(0.001, 0.9)},
    "eval": {"topk": st.lists(st.integers(1, 1000), min_size=1, max_size=4)},
}
filled = st.fixed_dictionaries({name: st.fixed_dictionaries({}, optional=fields) for name, fields in valid.items()})


@settings(deadline=None)
@given(values=filled)
@example(values={"data": {"root": "1e3"}, "model": {"name": "0x1F", "args": {"a": "true", "b_1": "~", "On": "1_0"}}})
def test_values_survive_reading_and_a_resolved_recipe_too(
    values: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    # JSON is YAML: the values are written by a program that is not the one that reads them.
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    recipe = load_recipe(path)
    resolved = recipe.model_dump(mode="json")
    assert {name: {key: resolved[name][key] for key in section} for name, section in values.items()} == values
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_recipes_and_conversions_know_the_same_kinds_of_norm() -> None:
    assert get_args(NormConfig.model_fields["kind"].annotation) == KINDS
