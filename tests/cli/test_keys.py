"""Keys of a recipe: listed, completed by a shell, printed as they would run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from calls import call
from typer.testing import CliRunner

from bkn_cli.app import app
from bkn_core.recipe import load_recipe
from bkn_core.recipe_keys import RecipeKey, recipe_keys

PROGRAM = """
import sys
from bkn_cli.app import app
try:
    app(prog_name="bkn")
finally:
    print([name for name in ("torch", "numpy") if name in sys.modules], file=sys.stderr)
"""


def completed(*words: str) -> list[str]:
    """What bash is offered for the last of the words."""
    environment = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1), "_BKN_COMPLETE": "complete_bash"}
    return CliRunner().invoke(app, [], prog_name="bkn", env=environment).stdout.split()


def test_every_key_has_a_meaning_a_default_and_what_is_allowed() -> None:
    resolved = load_recipe(None).model_dump(mode="json")
    keys = recipe_keys()
    assert [key.name for key in keys] == [
        "name",
        "task",
        *(f"{s}.{k}" for s, part in resolved.items() if s not in ("version", "name", "task") for k in part),
    ]
    assert [key.name for key in keys if not (key.meaning and key.allowed and key.default)] == []


@pytest.mark.parametrize("key", recipe_keys(), ids=lambda key: key.name)
def test_defaults_and_named_values_are_values_of_the_key(key: RecipeKey) -> None:
    beside = {"data.download": ["data.name=CIFAR10"]}.get(key.name, [])
    for value in (key.default, *key.values):
        load_recipe(None, [*beside, f"{key.name}={value}"])


def test_keys_that_begin_so_are_listed_with_their_section_or_without() -> None:
    found = json.loads(call("keys", "lr", "--json").stdout)["result"]["keys"]
    assert [(key["name"], key["default"], key["allowed"]) for key in found] == [
        ("optim.lr", "0.1", "a finite number above 0")
    ]
    text = call("keys", "norm.k").stdout
    assert "norm.kind" in text and "bkn, bn, brn, gn" in text and "norm.gain" not in text
    assert "without recipe" in text and "--print-config" in text  # what a recipe says is another matter


def test_a_key_that_does_not_exist_is_refused_with_the_nearest(refuse: Callable[..., dict[str, Any]]) -> None:
    assert refuse(2, "keys", "norm.knid")["message"] == "no key begins with 'norm.knid' (did you mean 'norm.kind'?)"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("bkn", "train", "dig"), ["digits_micro"]),
        (("bkn", "train", "log."), ["log.every=", "log.tensorboard=", "log.plots="]),
        (("bkn", "train", "norm.kind", "=", "b"), ["bkn", "bn", "brn"]),
        (("bkn", "train", "train.amp", "="), ["auto", "true", "false"]),
        (("bkn", "train", "train.amp=t"), ["train.amp=true"]),
        (("bkn", "train", "norm.me"), ["norm.message=normalized", "norm.message=raw"]),
        (("bkn", "train", "digits_micro", "cif"), []),
        (("bkn", "compare", "--norms", "bkn,g"), ["bkn,gn"]),
        (("bkn", "keys", "log.e"), ["log.every"]),
    ],
    ids=" ".join,
)
def test_a_shell_is_offered(words: tuple[str, ...], offered: list[str]) -> None:
    found = completed(*words)
    assert found[: len(offered)] == offered and (offered or found == [])


def test_completion_and_lists_do_not_wait_for_the_library() -> None:
    environment = {"COMP_WORDS": "bkn train norm.k", "COMP_CWORD": "2", "_BKN_COMPLETE": "complete_bash"}
    for words, more in (((), environment), (("keys",), {}), (("train", "--print-config"), {}), (("train", "--lr"), {})):
        command = [sys.executable, "-c", PROGRAM, *words]
        done = subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True, timeout=60)
        assert done.stderr.splitlines()[-1] == "[]"


def test_the_printed_recipe_is_the_one_that_would_run(inside: Path) -> None:
    words = ("cifar10_smoke", "norm.kind=bn", "batch.gradient=8", "--device", "cpu")
    result = call("train", *words, "--print-config")
    assert result.exit_code == 0
    assert "batch.per_device is 8, not 128" in result.stderr
    recipe = load_recipe("cifar10_smoke", ["norm.kind=bn", "batch.gradient=8", "train.device=cpu"])
    assert yaml.safe_load(result.stdout) == recipe.model_dump(mode="json")
    assert list(inside.iterdir()) == []
