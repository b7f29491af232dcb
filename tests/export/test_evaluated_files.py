"""What `evaluate` lets an exported file choose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

import bkn_core as bkn
from bkn_core.errors import InputError
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
    "data", [[1], "digits", {"name": 7}, {"nonsense": 1}, {"name=npz": 1}, {"root": "a\nb"}], ids=str
)
def test_data_that_cannot_be_are_refused(small: Path, tmp_path: Path, data: Any) -> None:
    path = claiming(small, tmp_path / "model.onnx", data)
    with pytest.raises(InputError, match=r"model\.onnx names data that cannot be"):
        bkn.evaluate(path, device="cpu")
