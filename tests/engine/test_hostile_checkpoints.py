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
from tiny_runs import tiny
from torch import nn

from bkn_core.engine.checkpoint import digest, load_state, load_weights, save_weights
from bkn_core.engine.preprocess import Preprocess
from bkn_core.errors import InputError


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


def recursive() -> dict[str, Any]:
    value: dict[str, Any] = {"step": 1}
    value["self"] = value
    return value


HOSTILE: dict[str, Callable[[], Any]] = {
    "claims 35 TB": lambda: {"step": torch.zeros(1).expand(2**43)},
    "claims what fits": lambda: {"step": torch.zeros(1).expand(2)},
    "contains itself": recursive,
    "sparse": lambda: {"step": torch.eye(3).to_sparse()},
    "quantized": lambda: {"step": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)},
    "without data": lambda: {"step": torch.zeros(2, device="meta")},
    "a list": lambda: [1, 2],
    "a tensor": lambda: torch.ones(3),
    "nothing": lambda: None,
    "unsigned": lambda: {"step": 1},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_state_is_refused(tmp_path: Path, name: str) -> None:
    torch.save(HOSTILE[name](), tmp_path / "last.state.pt")
    with pytest.raises(InputError, match=r"last\.state\.pt is damaged"):
        load_state(tmp_path / "last.state.pt")
