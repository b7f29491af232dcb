"""Files that nobody vouches for are refused before ONNX Runtime sees them."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from bkn_core.errors import InputError
from bkn_core.export.graph import signed
from bkn_core.export.sessions import open_session


@pytest.fixture(autouse=True)
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test of this file may get as far as a session."""

    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("a session was opened")

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)


def refused(path: Path, proto: Any, words: str) -> None:
    path.write_bytes(signed(proto))
    with pytest.raises(InputError, match=words):
        open_session(path, "cpu")


def test_a_flipped_bit_anywhere_is_refused(small: Path, tmp_path: Path) -> None:
    whole, draw = small.read_bytes(), random.Random(0)
    path = tmp_path / "model.onnx"
    for bit in draw.sample(range(8 * len(whole)), 100):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(changed))
        with pytest.raises(InputError, match=r"model\.onnx is"):
            open_session(path, "cpu")


def test_a_weight_that_was_changed_by_another_program_is_refused(small: Path, tmp_path: Path) -> None:
    proto = onnx.load(small)
    proto.graph.initializer[0].raw_data = bytes(len(proto.graph.initializer[0].raw_data))
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"changed since its export: it does not have its digest bkn\.sha256"):
        open_session(tmp_path / "model.onnx", "cpu")


def test_the_digest_is_that_of_the_file_with_zeros_in_its_place(small: Path) -> None:
    data = small.read_bytes()
    digest = next(json.loads(entry.value) for entry in onnx.load(small).metadata_props if entry.key == "bkn.sha256")
    assert hashlib.sha256(data.replace(digest.encode(), b"0" * 64)).hexdigest() == digest


def external(location: str) -> Any:
    tensor = TensorProto(name="stolen", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def into_initializers(graph: Any, tensor: Any) -> None:
    graph.initializer.append(tensor)


def into_constant(graph: Any, tensor: Any) -> None:
    graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))


def into_sparse(graph: Any, tensor: Any) -> None:
    graph.sparse_initializer.add().values.CopyFrom(tensor)


@pytest.mark.parametrize("hide", [into_initializers, into_constant, into_sparse])
@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "link", "inside"])
def test_tensors_in_other_files_are_refused(
    small: Path, tmp_path: Path, location: str, hide: Callable[[Any, Any], None]
) -> None:
    (tmp_path / "inside").write_bytes(bytes(8))
    (tmp_path / "link").symlink_to("/etc/passwd")
    proto = onnx.load(small)
    hide(proto.graph, external(location))
    refused(tmp_path / "model.onnx", proto, "'stolen' lies in another file")


def test_external_data_without_the_flag_is_refused(small: Path, tmp_path: Path) -> None:
    proto = onnx.load(small)
    proto.graph.initializer[0].external_data.add(key="location", value="/etc/passwd")
    refused(tmp_path / "model.onnx", proto, "lies in another file")


def test_tensors_that_claim_more_than_they_hold_are_refused(small: Path, tmp_path: Path) -> None:
    proto = onnx.load(small)
    proto.graph.initializer[0].dims[:] = [50_000, 50_000]
    refused(tmp_path / "model.onnx", proto, "claims the shape")
    proto.graph.initializer[0].dims[:] = [1000, 1000]
    refused(tmp_path / "model.onnx", proto, r"of shape \[1000, 1000\] holds")


@pytest.mark.parametrize("dims", [[3, 50_000, 50_000], [3, 0, 4], [-3, 8, 8]])
def test_images_that_nobody_could_hold_are_refused(small: Path, tmp_path: Path, dims: list[int]) -> None:
    proto = onnx.load(small)
    for dim, size in zip(proto.graph.input[0].type.tensor_type.shape.dim[1:], dims, strict=True):
        dim.dim_value = size
    refused(tmp_path / "model.onnx", proto, "claims images|expected is|contradict")


def test_operators_that_inflate_a_few_numbers_are_refused(small: Path, tmp_path: Path) -> None:
    proto = onnx.load(small)
    shape = numpy_helper.from_array(np.array([50_000, 50_000], np.int64), "shape")
    proto.graph.initializer.append(shape)
    proto.graph.node.append(helper.make_node("ConstantOfShape", ["shape"], ["bomb"]))
    refused(tmp_path / "model.onnx", proto, "'bomb' would have the shape")
    proto.graph.value_info.append(helper.make_tensor_value_info("bomb", TensorProto.FLOAT, [1, 1]))
    refused(tmp_path / "model.onnx", proto, "'bomb' would have the shape")


def test_ends_that_lie_about_their_shape_are_refused(small: Path, tmp_path: Path) -> None:
    proto = onnx.load(small)
    shape = numpy_helper.from_array(np.array([50_000, 50_000], np.int64), "shape")
    proto.graph.initializer.append(shape)
    proto.graph.node[-1].output[0] = "true"
    proto.graph.node.append(helper.make_node("ConstantOfShape", ["shape"], ["logits"]))
    refused(tmp_path / "model.onnx", proto, "contradict")


def test_foreign_operators_control_flow_and_functions_are_refused(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    proto = onnx.load(small)
    proto.graph.node[0].domain = "com.evil"
    refused(path, proto, "of the domain 'com.evil'")
    proto = onnx.load(small)
    body = helper.make_graph([], "body", [], [])
    proto.graph.node.append(helper.make_node("Loop", ["", ""], ["forever"], body=body))
    refused(path, proto, r"control flow \(Loop\)")
    proto = onnx.load(small)
    proto.functions.add().name = "f"
    refused(path, proto, "functions")


def test_files_that_are_no_models_are_refused(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    path = tmp_path / "model.onnx"
    for content in (b"", b"garbage" * 100, whole[: len(whole) // 2], whole[:-1], os.urandom(4096)):
        path.write_bytes(content)
        with pytest.raises(InputError):
            open_session(path, "cpu")


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("missing", "No such file"), ("pipe", "is no file"), (".", "is no file")):
        with pytest.raises(InputError, match=words):
            open_session(tmp_path / name, "cpu")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("classes", None, "lacks the metadata classes"),
        ("classes", "[1, 2]", r"classes is \[1, 2\]; give a list of names"),
        ("classes", "[" * 100_000, "no JSON text"),
        ("classes", json.dumps(["a", "b"]), "10 logits for 2 names"),
        ("preprocess", "[]", "`preprocess` is no JSON object"),
        ("preprocess", "{}", "preprocess has the keys"),
        ("bkn.schema", '"bkn.onnx/99"', 'bkn.schema is "bkn.onnx/99"'),
        ("task", '"segment"', "task is 'segment'; choose one of classify"),
        ("bkn.version", "7", "version is 7; give text"),
        ("norm", "[]", r"norm is \[\]; give a mapping"),
        ("parity", "{}", "parity.max_abs is missing; give a finite number of at least 0"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_damaged_metadata_is_refused(small: Path, tmp_path: Path, key: str, value: str | None, words: str) -> None:
    proto = onnx.load(small)
    entries = {entry.key: entry.value for entry in proto.metadata_props} | {key: value}
    del proto.metadata_props[:]
    helper.set_model_props(proto, {k: v for k, v in entries.items() if v is not None})
    refused(tmp_path / "model.onnx", proto, words)


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("norm", {"stats": 5}, "norm.stats is 5; choose one of population, batch"),
        ("norm", {"kind": "bnk"}, r"norm.kind is 'bnk'; choose one of .* \(did you mean 'bkn'\?\)"),
        ("norm", {"folded": True}, "norm.folded is true; give affine, conv, matrix or null"),
        ("norm", {"statistics_batch_size": 2.5}, "norm.statistics_batch_size is 2.5; give an integer"),
        ("source", {"weights_sha256": 5}, "source.weights_sha256 is 5; give 64 hexadecimal digits"),
        ("source", {"path": "x"}, "source.path is not known; known are model, weights_sha256, data"),
        ("source", {"data": False}, "source.data is false; give a mapping"),
        ("parity", {"images": "64"}, "parity.images is '64'; give an integer"),
        ("preprocess", {"scale": True}, "preprocess.scale is True; allowed is a number"),
        ("preprocess", {"antialias": 1}, "preprocess.antialias is 1; allowed is true"),
    ],
    ids=str,
)
def test_what_a_file_says_of_itself_is_typed(
    small: Path, tmp_path: Path, key: str, change: dict[str, Any], words: str
) -> None:
    proto = onnx.load(small)
    entry = next(entry for entry in proto.metadata_props if entry.key == key)
    entry.value = json.dumps(json.loads(entry.value) | change)
    refused(tmp_path / "model.onnx", proto, rf"model\.onnx is refused: .*{words}")


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_weights_that_are_no_numbers_are_refused(small: Path, tmp_path: Path, kind: type[np.floating[Any]]) -> None:
    proto = onnx.load(small)
    values = numpy_helper.to_array(proto.graph.initializer[0]).astype(kind)
    values.flat[-1] = np.nan
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "spoiled"))
    refused(tmp_path / "model.onnx", proto, r"'spoiled' holds values that are no numbers \(NaN\)")


@pytest.mark.parametrize("change", [{"color": []}, {"image_size": [10**400, 1]}, {"mean": [10**400] * 3}])
def test_preprocessing_of_impossible_values_is_refused(small: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    proto = onnx.load(small)
    entry = next(entry for entry in proto.metadata_props if entry.key == "preprocess")
    entry.value = json.dumps(json.loads(entry.value) | change)
    refused(tmp_path / "model.onnx", proto, "preprocess")
