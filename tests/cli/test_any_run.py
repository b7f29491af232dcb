"""Whatever a recipe or the environment says, a run trains or is refused: nothing is called a fault of the program."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from calls import call
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from bkn_core.data import splits
from bkn_core.recipe import Recipe

FEW = ("train.epochs=1", "data.train_images=8", "data.test_images=4", "data.image_size=8", "batch.gradient=4")
FEW = (*FEW, "model.name=cifar_plain", "train.device=cpu", "log.plots=false")
SECTIONS = {name: type(section).model_fields for name, section in Recipe() if isinstance(section, BaseModel)}
# What would only take long: more epochs, a compiler, a picture, a network connection, a large model.
LONG = {"train.epochs", "train.compile", "log.plots", "data.download"}
MODELS = ("cifar_resnet8", "cifar_preact_resnet8", "cifar_resnet7", "mnasnet0_5", "squeezenet1_0", "nosuch", "timm:")
VALUES = (
    "0",
    "1",
    "2",
    "3",
    "7",
    "-1",
    "30000",
    "1000000000000",
    "0.5",
    "1",
    "1e-300",
    "1e30",
    "1e300",
    "null",
    "true",
)
VALUES = (*VALUES, "false", "auto", "none", "[1, 2]", "[30000, 1]", "{a: 0}", "''", "/dev/null", "~nosuchuser", "~")
NUMBERS = ("", "abc", "0", "-1", "1", "2", "1e9", "99999999999")
PLACES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "COLUMNS", "MPLBACKEND", "BKN_NATIVE", "HOME", "TMPDIR")


def words_of(section: str, key: str) -> list[str]:
    kind = SECTIONS[section][key].annotation
    own = get_args(kind) if get_origin(kind) is Literal else ()
    own = {"model.name": MODELS, "data.name": ("digits", "npz", "imagefolder", "CIFAR10")}.get(f"{section}.{key}", own)
    return [f"{section}.{key}={value}" for value in (*own, *VALUES)]


WORDS = [
    w for name, keys in SECTIONS.items() for key in keys if f"{name}.{key}" not in LONG for w in words_of(name, key)
]


@pytest.fixture(scope="module", autouse=True)
def _light(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("any"))
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(splits, "open_digits", functools.cache(splits.open_digits))
        yield


def assert_trained_or_refused(words: list[str], environment: dict[str, str]) -> None:
    if not Path("loop").is_symlink():
        Path("loop").symlink_to("loop")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        result = call("train", *FEW, *words, "--verbose")
    assert result.exit_code in (0, 2, 3, 5, 6), result.output


drawn = given(
    words=st.lists(st.sampled_from(WORDS), max_size=3, unique_by=lambda word: word.partition("=")[0]),
    environment=st.dictionaries(st.sampled_from(PLACES), st.sampled_from(NUMBERS), max_size=1),
)


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@drawn
@example(words=["data.image_size=30000"], environment={})
@example(words=["data.image_size=[30000, 1]"], environment={})
@example(words=["model.name=squeezenet1_0"], environment={})
@example(words=["model.name=mnasnet0_5", "model.args={alpha: 0}"], environment={})
@example(words=["model.name=mnasnet0_5", "model.args={dropout: 9}"], environment={})
@example(words=["data.name=imagefolder", "data.root=loop"], environment={})
@example(words=["data.name=npz", "data.root=~nosuchuser"], environment={})
@example(words=[], environment={"WORLD_SIZE": "abc"})
def test_any_run_trains_or_is_refused(words: list[str], environment: dict[str, str]) -> None:
    assert_trained_or_refused(words, environment)


@pytest.mark.slow
@settings(max_examples=600, suppress_health_check=[HealthCheck.too_slow])
@drawn
def test_many_runs_train_or_are_refused(words: list[str], environment: dict[str, str]) -> None:
    assert_trained_or_refused(words, environment)


@pytest.mark.slow
def test_a_screen_that_does_not_exist_does_not_end_a_run(tmp_path: Path) -> None:
    words = [*FEW, "log.plots=true", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "bkn_cli", "train", *words]
    subprocess.run(command, env={**os.environ, "MPLBACKEND": "abc"}, check=True, timeout=300)
    assert (tmp_path / "run" / "plots" / "curves.png").is_file()
