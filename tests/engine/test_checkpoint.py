"""Checkpoints: what is saved comes back to the bit; what is damaged or hostile is refused and does nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import assert_same_bits, tiny
from torch import Tensor, nn

from bkn_core.data.preprocess import Preprocess
from bkn_core.engine.build import build_model
from bkn_core.engine.checkpoint import (
    load_run,
    load_state,
    load_strictly_,
    load_weights,
    save_state,
    save_weights,
    weights_path,
)
from bkn_core.errors import InputError

PREPROCESS = Preprocess("L", (8, 8), (0.25,), (0.5,))
CLASSES = ("null", "eins", "größer")
# Every type that a tensor of a model or an optimizer may have.
TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8)
MUTATIONS = 200


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(3, 3))


def state() -> dict[str, Any]:
    tensors = {str(kind): torch.randn(3, 2).to(kind) for kind in TYPES}
    tensors["channels_last"] = torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last)
    return {
        "schema": "bkn.state/1",
        "step": 3,
        "seconds": 0.1 + 0.2,
        "best": {"top1": -1.0, "epoch": 0},
        "losses": torch.zeros(0),
        "scalar": torch.tensor(0.3),
        "model": tensors,
        "average": {},
        "optimizer": {
            "state": {"0": {"momentum_buffer": torch.randn(4)}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
        "scaler": {},
    }


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    path = tmp_path / "last.safetensors"
    save_weights(path, model(), tiny(), CLASSES, PREPROCESS)
    return path


@pytest.fixture
def state_file(tmp_path: Path) -> Path:
    path = tmp_path / "last.state.pt"
    save_state(path, state())
    return path


def refused_or(load: Callable[[Path], Any], path: Path, expected: Any, what: str) -> bool:
    """Whether a file is refused; one that is not must give exactly what was saved."""
    try:
        found = load(path)
    except InputError as error:
        assert str(path) in error.message, what
        return True
    assert_same_bits(found, expected, what)
    return False


def mutated(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Flip a bit, cut the end off, put noise over a stretch, remove or repeat one."""
    start = draw.randrange(len(content))
    end = min(len(content), start + draw.randint(1, 64))
    kind = draw.choice(["flip", "flip", "flip", "truncate", "noise", "zero", "remove", "repeat"])
    changes = {
        "flip": bytes([content[start] ^ 1 << draw.randrange(8)]) + content[start + 1 : end],
        "truncate": b"",
        "noise": draw.randbytes(end - start),
        "zero": bytes(end - start),
        "remove": b"",
        "repeat": content[start:end] * 2,
    }
    rest = b"" if kind == "truncate" else content[end:]
    return content[:start] + changes[kind] + rest, f"{kind} at {start} of {len(content)}"


def weights_facts(path: Path) -> Any:
    found = load_weights(path)
    return [found.tensors, found.recipe, list(found.classes), found.preprocess]


def test_weights_come_back_to_the_bit_with_their_description(tmp_path: Path) -> None:
    net = model().to(memory_format=torch.channels_last)
    save_weights(tmp_path / "w.safetensors", net, tiny("norm.gain=0.3"), CLASSES, PREPROCESS)
    found = load_weights(tmp_path / "w.safetensors")
    assert_same_bits(dict(sorted(found.tensors.items())), dict(sorted(net.state_dict().items())))
    assert (found.recipe, found.classes, found.preprocess) == (tiny("norm.gain=0.3"), CLASSES, PREPROCESS)


def test_weights_that_share_memory_are_saved_apart(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    save_weights(tmp_path / "w.safetensors", net, tiny(), CLASSES, PREPROCESS)
    tensors = load_weights(tmp_path / "w.safetensors").tensors
    assert torch.equal(tensors["0.weight"], tensors["1.weight"])


def test_a_state_of_every_type_comes_back_to_the_bit(state_file: Path) -> None:
    torch.manual_seed(0)
    assert_same_bits(load_state(state_file), state())


@pytest.mark.parametrize("seed", range(4))
def test_damaged_weights_are_refused_or_the_same(weights_file: Path, seed: int) -> None:
    content, expected, draw = weights_file.read_bytes(), weights_facts(weights_file), random.Random(seed)
    refused = 0
    for _ in range(MUTATIONS // 4):
        changed, what = mutated(content, draw)
        weights_file.write_bytes(changed)
        refused += refused_or(weights_facts, weights_file, expected, what)
    assert refused >= 40


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_state_is_refused_or_the_same(state_file: Path, seed: int) -> None:
    content, expected, draw = state_file.read_bytes(), load_state(state_file), random.Random(seed)
    refused = 0
    for _ in range(MUTATIONS // 4):
        changed, what = mutated(content, draw)
        state_file.write_bytes(changed)
        refused += refused_or(load_state, state_file, expected, what)
    assert refused >= 10, "a zip archive has names and paddings that do not count"


@pytest.mark.slow
@pytest.mark.parametrize("which", ["weights", "state"])
def test_every_flipped_bit_is_refused_or_does_not_count(weights_file: Path, state_file: Path, which: str) -> None:
    path, load = (weights_file, weights_facts) if which == "weights" else (state_file, load_state)
    content, expected = path.read_bytes(), load(path)
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(changed))
        refused_or(load, path, expected, f"bit {bit}")


def test_a_changed_empty_entry_of_a_state_is_noticed(state_file: Path) -> None:
    content = state_file.read_bytes()
    assert content.count(b"scaler") == 1
    state_file.write_bytes(content.replace(b"scaler", b"scales"))
    with pytest.raises(InputError, match=r"last\.state\.pt is damaged"):
        load_state(state_file)


def test_names_and_shapes_that_do_not_fit_are_all_listed_and_nothing_is_loaded() -> None:
    net = model()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    tensors: dict[str, Tensor] = {name: torch.full_like(tensor, 7) for name, tensor in before.items()}
    del tensors["0.weight"], tensors["1.num_batches_tracked"]
    tensors |= {"3.weight": torch.zeros(4, 4), "1.bias": torch.zeros(9), "stranger": torch.zeros(1)}
    with pytest.raises(InputError) as caught:
        load_strictly_(net, tensors)
    for name in ("0.weight", "1.num_batches_tracked", "3.weight", "1.bias", "stranger", "(4, 4)", "(9,)"):
        assert name in caught.value.message
    assert_same_bits(dict(net.state_dict()), before)


@pytest.mark.parametrize("damage", ["missing", "empty", "folder"])
@pytest.mark.parametrize("load", [load_weights, load_state], ids=["weights", "state"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, load: Callable[[Path], Any], damage: str) -> None:
    path = tmp_path / "checkpoint"
    if damage == "empty":
        path.touch()
    elif damage == "folder":
        path.mkdir()
    with pytest.raises(InputError, match="checkpoint"):
        load(path)


def test_the_last_weights_of_a_folder_come_before_the_best(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no checkpoint"):
        weights_path(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        load_run(tmp_path / "nowhere")
    for name in ("best", "last"):
        path = tmp_path / "checkpoints" / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        assert weights_path(tmp_path) == path == weights_path(path)


def test_a_loaded_run_is_the_model_that_was_saved_in_evaluation_mode(tmp_path: Path) -> None:
    recipe = tiny("train.seed=3")
    net = build_model(recipe, PREPROCESS, len(CLASSES)).eval()
    save_weights(tmp_path / "w.safetensors", net, recipe, CLASSES, PREPROCESS)
    images = torch.randn(3, 1, 8, 8)
    loaded = load_run(tmp_path / "w.safetensors")
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(images), net(images))


def test_what_an_earlier_version_called_fixed_is_frozen(tmp_path: Path) -> None:
    net = build_model(tiny("norm.kind=frozen"), PREPROCESS, len(CLASSES)).eval()
    save_weights(tmp_path / "w.safetensors", net, tiny("norm.kind=fixed"), CLASSES, PREPROCESS)
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(load_run(tmp_path / "w.safetensors")(images), net(images))
