"""What `evaluate` lets an exported file choose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import bkn_core as bkn
from bkn_core.errors import CheckFailedError, InputError, RecipeError
from bkn_core.export.graph import signed


def claiming(small: Path, path: Path, data: Any) -> Path:
    """An exported file that says it is for these data."""
    proto = onnx.load(small)
    entry = next(entry for entry in proto.metadata_props if entry.key == "source")
    entry.value = json.dumps(json.loads(entry.value) | {"data": data})
    path.write_bytes(signed(proto))
    return path


@pytest.mark.parametrize("root", ["/etc", "..", "inside/../.."])
def test_a_file_does_not_choose_data_outside_the_working_folder(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = claiming(small, Path("model.onnx"), {"name": "imagefolder", "root": root})
    with pytest.raises(InputError, match=f"names the data '{root}', outside the working folder") as caught:
        bkn.evaluate(path, device="cpu")
    assert f"data.root={root}" in caught.value.hint
    with pytest.raises(InputError, match="outside the working folder"):
        bkn.evaluate(path, device="cpu", overrides=["data.test_images=3"])
    with pytest.raises(InputError, match=r"^(?!.*working folder)"):
        bkn.evaluate(path, device="cpu", overrides=[f"data.root={root}"])


def test_a_file_does_not_choose_to_download(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = claiming(small, Path("model.onnx"), {"name": "CIFAR10", "root": "new", "download": True})
    with pytest.raises(InputError):
        bkn.evaluate(path, device="cpu")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([1], r"source.data is \[1\]; give a mapping"),
        ("digits", "source.data is 'digits'; give a mapping"),
        ({"name": 7}, "source.data.name is 7; give text"),
        ({"test_images": "x"}, "source.data.test_images is 'x'; give an integer of at least 1, or null"),
        ({"nonsense": 1}, "source.data.nonsense is not known; known are name, root"),
        ({"name=npz": 1}, "source.data.name=npz is not known"),
        ({"root": "a\nb"}, r"source.data.root is 'a\\nb'; give text"),
        ({"name": "nosuch"}, "names data that cannot be: data.name is 'nosuch'; choose one of digits"),
        ({"test_images": 10**12}, "names data that cannot be: data.test_images is 1000000000000, but digits has 360"),
        ({"name": "npz", "root": "\ufffe"}, "data.root \ufffe .* is not a .npz file"),
    ],
    ids=str,
)
def test_data_that_cannot_be_are_refused(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Any, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = claiming(small, Path("model.onnx"), data)
    with pytest.raises(InputError, match=words):
        bkn.evaluate(path, device="cpu")


def test_what_the_command_says_of_the_data_is_the_commands_fault(small: Path, tmp_path: Path) -> None:
    path = claiming(small, tmp_path / "model.onnx", {"test_images": 10**12})
    with pytest.raises(RecipeError, match=r"data\.test_images is 999999"):
        bkn.evaluate(path, device="cpu", overrides=["data.test_images=999999"])


def test_infinite_logits_are_no_measurement(small: Path, tmp_path: Path) -> None:
    proto = onnx.load(small)
    channels = numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == "head.bias"))
    next(t for t in proto.graph.initializer if t.name == "head.bias").CopyFrom(
        numpy_helper.from_array(np.full_like(channels, np.inf), "head.bias")
    )
    images = np.zeros((4, 16, 16, 3), np.uint8)
    arrays = {
        f"{split}_{name}": v for split in ("train", "test") for name, v in (("images", images), ("labels", [0] * 4))
    }
    np.savez(tmp_path / "data.npz", **arrays, classes=[f"class {i}" for i in range(10)])
    (tmp_path / "model.onnx").write_bytes(signed(proto))
    words = ["data.name=npz", f"data.root={tmp_path / 'data.npz'}"]
    with pytest.raises(CheckFailedError, match="not finite for 4 of 4 images"):
        bkn.evaluate(tmp_path / "model.onnx", device="cpu", overrides=words)
    assert not (tmp_path / "model.predictions.npz").exists()


@pytest.mark.parametrize("stats", ["both", "mixtures"])
def test_a_file_has_one_kind_of_statistics(small: Path, stats: str) -> None:
    with pytest.raises(RecipeError, match=f"normalizes by population statistics, not by {stats}") as caught:
        bkn.evaluate(small, stats=stats)
    assert caught.value.hint == "A file has one kind of statistics: name the run that it came from."
