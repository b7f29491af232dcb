"""Checkpoints that lie: refused before anything in them runs or is believed."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tiny_runs import tiny
from torch import nn

from bkn_core.data.preprocess import Preprocess
from bkn_core.engine.checkpoint import largest_file, load_state, load_weights, save_weights
from bkn_core.engine.tensor_files import digest
from bkn_core.errors import BknError, InputError


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    path = tmp_path / "last.safetensors"
    preprocess = Preprocess("L", (8, 8), (0.25,), (0.5,))
    save_weights(path, nn.Sequential(nn.Linear(3, 3)), tiny(), ("zero", "one"), preprocess)
    return path


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_safetensors(header: dict[str, Any], data: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize("length", [0, 1, 7, 2**24, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_lies_about_its_length_is_refused(weights_file: Path, length: int) -> None:
    header, data = split_safetensors(weights_file.read_bytes())
    weights_file.write_bytes(join_safetensors(header, data, length))
    with pytest.raises(InputError, match=r"last\.safetensors is damaged"):
        load_weights(weights_file)


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": [2]},
        {"shape": [2**40]},
        {"shape": [1, 3]},
        {"shape": [-3]},
        {"dtype": "I32"},
        {"dtype": "U32"},
        {"dtype": "F64"},
        {"dtype": "F8_E4M3"},
        {"dtype": "X"},
        {"data_offsets": [4, 16]},
        {"data_offsets": [2**62, 2**62 + 12]},
        {"data_offsets": [12, 0]},
    ],
    ids=str,
)
def test_a_header_that_lies_about_a_tensor_is_refused(weights_file: Path, lie: dict[str, Any]) -> None:
    header, data = split_safetensors(weights_file.read_bytes())
    header["0.bias"] |= lie
    weights_file.write_bytes(join_safetensors(header, data))
    with pytest.raises(InputError, match=r"last\.safetensors is damaged"):
        load_weights(weights_file)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "BOOL", "U16", "C64"])
def test_a_type_that_no_run_writes_is_refused(weights_file: Path, dtype: str) -> None:
    header, data = split_safetensors(weights_file.read_bytes())
    bits = {"F4": 4, "U16": 16, "C64": 64}.get(dtype, 8)
    header["0.weight"] |= {"dtype": dtype, "shape": [9 * 32 // bits]}
    weights_file.write_bytes(join_safetensors(header, data))
    with pytest.raises(InputError, match=r"last\.safetensors is damaged"):
        load_weights(weights_file)


@pytest.mark.parametrize("key", ["schema", "recipe", "classes", "preprocess", "digest"])
def test_weights_without_their_description_are_refused(weights_file: Path, key: str) -> None:
    header, data = split_safetensors(weights_file.read_bytes())
    del header["__metadata__"][key]
    weights_file.write_bytes(join_safetensors(header, data))
    with pytest.raises(InputError, match="not written by"):
        load_weights(weights_file)


@pytest.mark.parametrize(
    "lie",
    [
        {"recipe": "version: 1\nsecret: 2"},
        {"recipe": "{"},
        {"recipe": "!!python/object/apply:os.getcwd []"},
        {"classes": "7"},
        {"classes": "{"},
        {"preprocess": "{}"},
        {"preprocess": "[]"},
    ],
    ids=str,
)
def test_a_description_that_lies_with_a_digest_that_fits_is_refused(weights_file: Path, lie: dict[str, str]) -> None:
    tensors = load_weights(weights_file).tensors
    header, data = split_safetensors(weights_file.read_bytes())
    metadata = header["__metadata__"] | lie
    del metadata["digest"]
    header["__metadata__"] = metadata | {"digest": digest(tensors, sorted(metadata.items()))}
    weights_file.write_bytes(join_safetensors(header, data))
    with pytest.raises(InputError):
        load_weights(weights_file)


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
@pytest.mark.parametrize("name", ["last.state.pt", "last.safetensors"])
def test_a_pickle_payload_is_refused_and_not_executed(
    tmp_path: Path, write: Callable[[Any, Path], Any], name: str
) -> None:
    touched = tmp_path / "touched"
    write({"step": Payload(touched)}, tmp_path / name)
    with pytest.raises(InputError, match=name):
        (load_state if name.endswith("pt") else load_weights)(tmp_path / name)
    assert not touched.exists()
    with open(tmp_path / name, "rb") as file:
        (partial(torch.load, weights_only=False) if write is torch.save else pickle.load)(file)
    assert touched.exists(), "the payload would have worked"


def described(state: Any, **tensors: torch.Tensor) -> bytes:
    """A state file with a digest that fits."""
    texts = {"state": json.dumps(state)}
    return save(tensors, texts | {"digest": digest(tensors, sorted(texts.items()))})


HOSTILE: dict[str, bytes] = {
    "a tensor twice": described({"a": {"$tensor": "x"}, "b": {"$tensor": "x"}}, x=torch.ones(3)),
    "a tensor that is not there": described({"a": {"$tensor": "y"}}, x=torch.ones(3)),
    "a tensor without a place": described({"a": 1}, x=torch.ones(3)),
    "a reference to nothing": described({"a": {"$tensor": ["x"]}}, x=torch.ones(3)),
    "a list": described([1, 2]),
    "a tensor": described({"$tensor": "x"}, x=torch.ones(3)),
    "nothing": described(None),
    "unsigned": save({"x": torch.ones(3)}, {"state": "{}"}),
    "without a state": save({"x": torch.ones(3)}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_state_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "last.state.pt").write_bytes(HOSTILE[name])
    with pytest.raises(InputError, match=r"last\.state\.pt is damaged"):
        load_state(tmp_path / "last.state.pt")


def test_a_state_nested_beyond_reason_is_refused(tmp_path: Path) -> None:
    texts = {"state": "[" * 100_000 + "]" * 100_000}
    (tmp_path / "last.state.pt").write_bytes(save({}, texts | {"digest": digest({}, sorted(texts.items()))}))
    with pytest.raises(InputError, match=r"last\.state\.pt is damaged"):
        load_state(tmp_path / "last.state.pt")


def test_a_state_of_the_time_of_pickles_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save({"step": 1}, tmp_path / "last.state.pt")
    with pytest.raises(InputError, match="this version has saved"):
        load_state(tmp_path / "last.state.pt")


def hollow(path: Path, header: dict[str, Any], size: int) -> None:
    """A file whose tensor is a hole in the disk."""
    header = header | {"hole": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    path.write_bytes(join_safetensors(header, b""))
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + size)


def test_a_file_larger_than_its_model_is_refused_before_it_is_read(weights_file: Path) -> None:
    header, _ = split_safetensors(weights_file.read_bytes())
    hollow(weights_file, {"__metadata__": header["__metadata__"]}, 2**33)
    with pytest.raises(InputError, match=r"has \d+ bytes; a model of its recipe has at most"):
        load_weights(weights_file)
    hollow(weights_file, {"__metadata__": {"state": "{}", "digest": "0"}}, 2**33)
    with pytest.raises(InputError, match=r"has \d+ bytes; a model of its recipe has at most"):
        load_state(weights_file, largest_file(nn.Linear(3, 3)))


def test_a_recipe_of_a_model_larger_than_the_file_is_refused_before_it_is_built(tmp_path: Path) -> None:
    recipe = tiny("model.name=vgg11", "data.image_size=32")
    save_weights(
        tmp_path / "w.safetensors",
        nn.Linear(3, 3),
        recipe,
        ("a", "b"),
        Preprocess("RGB", (32, 32), (0.5,) * 3, (0.5,) * 3),
    )
    with pytest.raises(InputError, match="the checkpoint holds 48 bytes, its recipe's model has 51"):
        load_weights(tmp_path / "w.safetensors").model()


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("recipe", ALIASES, "alias"),
        ("recipe", "extends: other.yaml", "extends is not a key"),
        ("recipe", "name: " + "x" * 2_000_000, "more than 1000000 characters"),
        ("recipe", "model: {name: cifar_resnet600002}", "a depth of 600002"),
        ("recipe", "model: {name: cifar_resnet" + "9" * 5000 + "}", "model.name is"),
        ("preprocess", {"image_size": [100_000, 100_000]}, "image_size"),
        ("preprocess", {"image_size": [True, True]}, "image_size"),
        ("preprocess", {"scale": 10**400}, "preprocess.scale"),
        ("preprocess", {"scale": 1e-320}, "preprocess.scale"),
        ("preprocess", {"mean": [10**400]}, "preprocess.mean"),
        ("preprocess", {"std": [1e-320]}, "preprocess.std"),
        ("classes", "[1, 2]", "cannot be loaded"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_description_of_what_nobody_could_build_is_refused(
    weights_file: Path, key: str, text: str | dict[str, Any], words: str
) -> None:
    weights, (header, data) = load_weights(weights_file), split_safetensors(weights_file.read_bytes())
    metadata = {key: text for key, text in header["__metadata__"].items() if key != "digest"}
    metadata[key] = text if isinstance(text, str) else json.dumps(json.loads(metadata[key]) | text)
    header["__metadata__"] = metadata | {"digest": digest(weights.tensors, sorted(metadata.items()))}
    weights_file.write_bytes(join_safetensors(header, data))
    with pytest.raises(BknError, match=words):
        load_weights(weights_file).model()
