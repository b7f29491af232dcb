"""`bkn predict`: the classes that `bkn eval` finds, from files, folders, zip files and patterns."""

from __future__ import annotations

import csv
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import call
from PIL import Image
from sklearn.datasets import load_digits

import bkn_core as bkn
from bkn_core.errors import CheckFailedError, RecipeError


@pytest.fixture
def pictures(inside: Path) -> Path:
    """Two scanned digits of each class, as files of other sizes than the model's images."""
    digits = load_digits()
    for label in range(10):
        for i in np.flatnonzero(digits.target == label)[:2]:
            for split in ("train", "test"):
                file = inside / "photos" / split / str(label) / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((digits.images[i] * 15.9).astype(np.uint8)).resize((20, 24)).save(file)
    return inside / "photos" / "test"


def predicted(*words: str, code: int = 0) -> list[dict[str, Any]]:
    result = call("predict", *words, "--json")
    assert result.exit_code == code, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)["result"]["predictions"]
    return found


@pytest.mark.parametrize("stats", ["population", "batch"])
def test_classes_are_those_that_an_evaluation_finds(run: Path, pictures: Path, stats: str) -> None:
    weights = run / "checkpoints" / "last.safetensors"
    (pictures.parent / "last.safetensors").write_bytes(weights.read_bytes())
    words = ("data.name=imagefolder", f"data.root={pictures.parent}", "data.test_images=null", "--stats", stats)
    evaluation = json.loads(call("eval", str(pictures.parent / "last.safetensors"), *words, "--json").stdout)
    table = np.load(evaluation["artifacts"]["predictions"])
    expected = dict(zip(table["names"].tolist(), table[f"{stats}_predictions"].tolist(), strict=True))
    found = predicted(str(weights), str(pictures), "--stats", stats, "--batch-size", "3")
    assert {row["file"]: int(row["class"]) for row in found} == expected and len(expected) == 20


def test_a_file_gives_what_its_run_gives(run: Path, pictures: Path, inside: Path) -> None:
    assert call("export", "model.onnx", "--run", str(run)).exit_code == 0
    ours, theirs = (predicted(name, "photos", "--top", "10") for name in (str(run), "model.onnx"))
    assert [row["file"] for row in ours] == [row["file"] for row in theirs] and len(ours) == 40
    for one, other in zip(ours, theirs, strict=True):
        probabilities = [{part["class"]: part["probability"] for part in row["top"]} for row in (one, other)]
        assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-5)
        assert sum(probabilities[0].values()) == pytest.approx(1, abs=1e-5)
        assert list(probabilities[0].values()) == sorted(probabilities[0].values(), reverse=True)


def test_names_are_files_folders_zip_files_and_patterns_each_picture_once(run: Path, pictures: Path) -> None:
    with zipfile.ZipFile("photos.zip", "w") as archive:
        archive.write(pictures / "3" / "3.png", "deep/3.png")
        archive.writestr("readme.txt", "no picture")
    found = predicted(str(run), f"{pictures}/3/3.png", f"{pictures}/3", f"{pictures}/[34]/*.png", "photos.zip")
    assert [row["file"] for row in found] == [
        *(f"{pictures}/{name}.png" for name in ("3/3", "3/13", "4/14", "4/4")),
        "photos.zip/deep/3.png",
    ]
    assert found[0]["top"] == found[-1]["top"]


def test_what_cannot_be_read_is_named_and_the_others_are_predicted(run: Path, pictures: Path) -> None:
    (pictures / "3" / "broken.png").write_text("no picture")
    result = call("predict", str(run), f"{pictures}/3", "--out", "found.csv", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 3 and document["ok"] is False
    assert "1 of 3 pictures could not be read; the first:" in document["error"]["message"]
    rows = document["result"]["predictions"]
    assert [row["class"] is None for row in rows] == [False, False, True] and "broken.png" in rows[2]["error"]
    with open("found.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["file"] for row in table] == [row["file"] for row in rows]
    assert [row["class"] for row in table] == [rows[0]["class"], rows[1]["class"], ""]
    assert float(table[0]["probability"]) == pytest.approx(rows[0]["probability"], abs=1e-6)
    assert [row["error"] for row in table] == ["", "", rows[2]["error"]]
    words = call("predict", str(run), f"{pictures}/3")
    assert "cannot be read" in words.stdout and words.exit_code == 3


def test_a_json_file_holds_what_the_json_object_holds(run: Path, pictures: Path) -> None:
    found = predicted(str(run), f"{pictures}/7", "--top", "3", "--out", "found.json")
    assert json.loads(Path("found.json").read_text()) == found and len(found[0]["top"]) == 3
    call("predict", str(run), f"{pictures}/7", "--top", "2", "--out", "found.csv")
    heads = Path("found.csv").read_text().splitlines()[0]
    assert heads == "file,class,probability,class_2,probability_2,error"


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        (3, ("none.png",), "there is no picture none.png"),
        (3, ("*.jpg",), "there is no picture *.jpg"),
        (3, ("empty",), "empty holds no picture"),
        (2, ("photos", "--out", "found.txt"), "predictions are not written as found.txt"),
    ],
)
def test_refusals(
    code: int, words: tuple[str, ...], message: str, run: Path, pictures: Path, refuse: Callable[..., dict[str, Any]]
) -> None:
    Path("empty").mkdir()
    assert refuse(code, "predict", str(run), *words)["message"] == message


def test_statistics_that_a_file_does_not_have_are_refused(run: Path, pictures: Path) -> None:
    bkn.export_onnx("model.onnx", run=run)
    with pytest.raises(RecipeError, match=r"model\.onnx normalizes by population statistics, not by batch"):
        bkn.predict("model.onnx", [pictures], stats="batch")


def test_progress_is_told_and_what_is_not_finite_is_no_prediction(
    run: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    bkn.predict(run, [pictures], batch_size=8, progress=lambda *step: told.append(step))
    assert told == [(8, 20), (16, 20), (20, 20)]
    monkeypatch.setattr(sys.modules["bkn_core.predict"], "normalize", lambda images, _: images.float() * float("nan"))
    with pytest.raises(CheckFailedError, match="not finite"):
        bkn.predict(run, [pictures])
