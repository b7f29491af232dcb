"""A run goes on with the data that it began with, wherever that lies, and with no other."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import stop_at, tiny

from bkn_core.data import splits
from bkn_core.data.splits import load_data
from bkn_core.engine.checkpoint import load_state, save_state
from bkn_core.engine.events import Event, Notice
from bkn_core.engine.fingerprint import check_data, fingerprint
from bkn_core.engine.loop import train
from bkn_core.engine.run_folder import RunFolder
from bkn_core.errors import InputError, InterruptedRun
from bkn_core.recipe import Recipe, load_recipe

SUFFIX = "bmp"  # without compression: a picture in the place of another has its size


def draw(path: Path, seed: int, height: int = 8) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, 8, 3), dtype=np.uint8)).save(path)


def write_pictures(root: Path) -> Path:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(4):
                draw(root / split / name / f"{index}.{SUFFIX}", index)
    return root


def recipe(root: Path) -> Recipe:
    return tiny("data.name=imagefolder", f"data.root={root}", "data.train_images=null", "data.test_images=null")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures and a run on them that was stopped."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(InterruptedRun):
        train(recipe(write_pictures(folder / "pictures")), out=folder / "run", should_stop=stop_at(1))
    return folder


def halve(root: Path) -> None:
    for path in root.glob(f"train/*/[23].{SUFFIX}"):
        path.unlink()


def rename(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "cat").rename(root / split / "zebra")


def relabel(root: Path) -> None:
    (root / "train" / "cat" / f"3.{SUFFIX}").rename(root / "train" / "dog" / f"9.{SUFFIX}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (halve, "4 training images, there were 8"),
        (rename, "classes gone: cat, new: zebra"),
        (relabel, "other labels of the training images"),
        (lambda root: draw(root / "train" / "cat" / f"1.{SUFFIX}", 99), "other content of the training images"),
        (lambda root: draw(root / "test" / "dog" / f"1.{SUFFIX}", 99), "other content of the test images"),
    ],
)
def test_a_run_does_not_go_on_with_other_data(
    stopped: Path, tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    shutil.copytree(stopped / "pictures", tmp_path / "pictures")
    change(tmp_path / "pictures")
    before = (stopped / "run" / "checkpoints" / "last.state.pt").read_bytes()
    with pytest.raises(InputError, match=f"is not what the run was trained on: {words}\nPut the data back"):
        train(recipe(tmp_path / "pictures"), resume=stopped / "run")
    assert (stopped / "run" / "checkpoints" / "last.state.pt").read_bytes() == before


def test_a_run_goes_on_where_its_data_has_moved(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped / "run", tmp_path / "run")
    shutil.copytree(stopped / "pictures", tmp_path / "elsewhere", copy_function=shutil.copy)  # with other times
    train(recipe(tmp_path / "elsewhere"), resume=tmp_path / "run")


def test_what_decides_nothing_may_change_when_a_run_goes_on_and_stays_so(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped / "run", tmp_path / "run")
    shutil.copytree(stopped / "pictures", tmp_path / "elsewhere")
    words = (f"data.root={tmp_path}/elsewhere", "data.name=imagefolder", "log.every=7", "eval.batch_size=3")
    events: list[Event] = []
    longer = tiny(*words, "data.train_images=null", "data.test_images=null", "train.epochs=3")
    train(longer, resume=tmp_path / "run", on_event=events.append)
    run = RunFolder.open(tmp_path / "run")
    assert run.recipe == longer
    assert [row["epoch"] for row in run.records() if row["kind"] == "epoch"] == [1, 2, 3]
    assert "train.epochs is 3, was 2" in next(event.text for event in events if isinstance(event, Notice))


@pytest.mark.parametrize(
    ("word", "key"),
    [("train.epochs=1", r"train\.epochs"), ("optim.lr=0.5", r"optim\.lr"), ("train.seed=3", r"train\.seed")],
)
@pytest.mark.parametrize("saved", [True, False])
def test_what_decides_may_not_change(stopped: Path, tmp_path: Path, word: str, key: str, saved: bool) -> None:
    shutil.copytree(stopped / "run", tmp_path / "run")
    if not saved:
        shutil.rmtree(tmp_path / "run" / "checkpoints")
    config = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(InputError, match=f"does not fit the recipe: {key} changed"):
        train(load_recipe(tmp_path / "run" / "config.yaml", [word]), resume=tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_bytes() == config


@pytest.mark.parametrize("data", [None, {}, {"classes": "all", "training": {}, "test": {}}, {"classes": []}])
def test_a_state_that_says_of_other_data_is_refused(stopped: Path, tmp_path: Path, data: Any) -> None:
    shutil.copytree(stopped / "run", tmp_path / "run")
    path = RunFolder.open(tmp_path / "run").state
    save_state(path, {**load_state(path), "data": data})
    with pytest.raises(InputError, match="data"):
        train(recipe(stopped / "pictures"), resume=tmp_path / "run")


def test_pixels_of_another_decoder_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (load_data("digits", root="unused", image_size=size) for size in (8, 9))
    before = fingerprint(one)
    monkeypatch.setattr(torch, "__version__", "99")
    check_data(before, fingerprint(other))


@pytest.mark.parametrize(("in_zip", "height"), [(False, 9), (True, 8)])
def test_images_that_are_not_in_memory_are_known_by_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_zip: bool, height: int
) -> None:
    """In a folder by their sizes, in a zip file by their checksums."""
    monkeypatch.setattr(splits, "MEMORY_LIMIT", 0)
    root = write_pictures(tmp_path / "pictures")

    def found() -> dict[str, Any]:
        place = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", root)) if in_zip else root
        return fingerprint(load_data("imagefolder", root=place, image_size=8))

    before = found()
    os.utime(root / "train" / "cat" / f"0.{SUFFIX}", (10**9, 10**9))
    check_data(before, found())
    draw(root / "train" / "cat" / f"1.{SUFFIX}", 99, height)
    with pytest.raises(InputError, match="trained on: other content of the training images\n"):
        check_data(before, found())


@pytest.mark.parametrize("limit", [0, splits.MEMORY_LIMIT])
def test_names_of_files_may_be_composed_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """As where a folder of a Mac was copied to Linux: e with an accent sorts before f, é as one character after it."""
    monkeypatch.setattr(splits, "MEMORY_LIMIT", limit)
    found = []
    for form in ("NFC", "NFD"):
        root = write_pictures(tmp_path / form)
        for path, name in ((root / "train" / "cat", "\u00e9"), (root / "train" / "dog", "f")):
            draw(path / f"{unicodedata.normalize(form, name)}.{SUFFIX}", 50)
        draw(root / "train" / "cat" / f"f.{SUFFIX}", 60)
        found.append(fingerprint(load_data("imagefolder", root=root, image_size=8)))
    check_data(*found)
