"""Exports that must not happen: what they say, and that they leave no file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from drawn_models import CLASSES, drawn_images, drawn_model, preprocess_of
from torch import Tensor, nn

from bkn_core.errors import CheckFailedError, ConversionError, OutputError, RecipeError
from bkn_core.export import graph, onnx_file
from bkn_core.export.onnx_file import ExportResult

Exporter = Callable[..., ExportResult]


def litter(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_graph_that_disagrees_leaves_no_file(
    export: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = onnx_file.build_graph

    def corrupted(*arguments: Any, **options: Any) -> Any:
        proto = build(*arguments, **options)
        tensor = next(t for t in proto.graph.initializer if t.name == "head.bias")
        values = onnx.numpy_helper.to_array(tensor) + np.float32(0.01)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        return proto

    monkeypatch.setattr(onnx_file, "build_graph", corrupted)
    path = tmp_path / "model.onnx"
    with pytest.raises(CheckFailedError, match=r"differ by 0\.01"):
        export(drawn_model(), drawn_images(), path)
    assert litter(tmp_path) == []
    path.write_bytes(b"an older file")
    with pytest.raises(CheckFailedError):
        export(drawn_model(), drawn_images(), path)
    assert litter(tmp_path) == ["model.onnx"] and path.read_bytes() == b"an older file"


def test_a_failed_rename_leaves_the_older_file_alone(
    export: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "model.onnx"
    path.write_bytes(b"an older file")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        export(drawn_model(), drawn_images(), path)
    assert litter(tmp_path) == ["model.onnx"] and path.read_bytes() == b"an older file"


def test_missing_folders_are_made(export: Exporter, tmp_path: Path) -> None:
    path = tmp_path / "some" / "where" / "model.onnx"
    assert export(drawn_model(), drawn_images(), path).path == path
    assert litter(path.parent) == ["model.onnx"]


def test_a_place_that_cannot_hold_a_file_is_refused(export: Exporter, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        export(drawn_model(), drawn_images(), tmp_path / "file" / "model.onnx")
    with pytest.raises(OutputError, match="is a folder"):
        export(drawn_model(), drawn_images(), tmp_path)


@pytest.mark.parametrize(
    "option", [{"stats": "both"}, {"fold": "all"}, {"precision": "int8"}, {"opset": 13}, {"opset": 99}], ids=str
)
def test_unknown_options_are_refused_by_name(export: Exporter, option: dict[str, Any]) -> None:
    name, value = next(iter(option.items()))
    with pytest.raises(RecipeError, match=f"{name} is {value!r}"):
        export(drawn_model(), drawn_images(), **option)


def test_classes_and_preprocessing_must_fit_the_model(export: Exporter) -> None:
    with pytest.raises(ConversionError, match="and 3 classes"):
        export(drawn_model(), drawn_images(), classes=("a", "b", "c"))
    with pytest.raises(ConversionError, match="the preprocessing makes"):
        export(drawn_model(), drawn_images(), preprocess=preprocess_of(drawn_images(size=20)))


class CountsImages(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : len(CLASSES)] / len(x)


class ReadsImages(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : len(CLASSES)] * (2 if x.sum() > 0 else 1)


def test_weights_beyond_one_file_are_refused(export: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "LARGEST", 1000)
    with pytest.raises(ConversionError, match="the weights take"):
        export(drawn_model(), drawn_images())


def test_a_model_that_fixes_the_number_of_images_is_refused(export: Exporter) -> None:
    with pytest.raises(ConversionError, match="CountsImages fixes the number of images"):
        export(CountsImages(), drawn_images())


def test_a_model_whose_flow_depends_on_the_images_is_refused(export: Exporter) -> None:
    with pytest.raises(ConversionError, match="ReadsImages cannot be traced"):
        export(ReadsImages(), drawn_images())
