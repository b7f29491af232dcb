"""The smallest runs that have everything: five passes in three steps an epoch, the last of them uneven."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bkn_core.engine.checkpoint import load_state, load_weights
from bkn_core.engine.distributed import World
from bkn_core.engine.loop import TrainResult, train
from bkn_core.engine.run_folder import RunFolder
from bkn_core.engine.training import Training
from bkn_core.errors import InterruptedRun
from bkn_core.recipe import Recipe, load_recipe

CPU = World(torch.device("cpu"))
WORDS = (
    "model.name=cifar_plain",
    "batch.gradient=16",
    "batch.per_device=8",
    "data.train_images=36",
    "data.test_images=40",
    "data.image_size=8",
    "train.epochs=2",
    "train.device=cpu",
    "eval.batch_size=20",
    "log.every=2",
    "log.plots=false",
)
# Everything that a state has to carry: momentum, average, innovation, drawn crops, an uneven last step.
FULL = ("train.ema=0.9", "norm.innovation=true", "data.augment=crop_flip", "eval.stats=both")
EPOCH_STEPS, STEPS = 3, 6
CLOCK = {"seconds", "images_per_second", "peak_memory"}


def tiny(*words: str) -> Recipe:
    return load_recipe(None, [*WORDS, *words])


def training(*words: str) -> Training:
    return Training(tiny(*words), CPU)


def stop_at(call: int) -> Callable[[], bool]:
    """A `should_stop` that says so when it is asked for the n-th time: after each step and before each test batch."""
    calls = iter(range(1, 1000))
    return lambda: next(calls) == call


def train_in_parts(recipe: Recipe, folder: Path, stops: tuple[int, ...]) -> TrainResult:
    """Train with interruptions; each part starts from nothing but the folder, under another random state."""
    for part, call in enumerate(stops):
        torch.manual_seed(part)
        try:
            train(recipe, should_stop=stop_at(call), **({"resume": folder} if part else {"out": folder}))
        except InterruptedRun:
            continue
        raise AssertionError(f"part {part} ended by itself")
    torch.manual_seed(99)
    return train(RunFolder.open(folder).recipe, resume=folder)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def assert_same_bits(found: Any, expected: Any, where: str = "") -> None:
    """Compare nested values, tensors by their bits, clocks and memory not at all."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            if key not in CLOCK:
                assert_same_bits(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same_bits(one, other, f"{where}.{i}")
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape, where
        assert torch.equal(bits(found), bits(expected)), where
    else:
        assert found == expected, where


def assert_same_run(found: Path, expected: Path) -> None:
    """Compare all that two runs left behind, down to the bits."""
    one, other = RunFolder.open(found), RunFolder.open(expected)
    assert_same_bits(load_state(one.state), load_state(other.state), "state")
    assert_same_bits(one.records(), other.records(), "records")
    for ours, theirs in ((one.weights, other.weights), (one.best, other.best)):
        assert load_weights(ours).digest == load_weights(theirs).digest, ours.name
    with np.load(found / "predictions.npz") as mine, np.load(expected / "predictions.npz") as its:
        assert all(np.array_equal(mine[name], its[name]) for name in its.files)


def litter(folder: Path) -> list[Path]:
    """The files that a write left aside."""
    return list(folder.rglob("*.part"))


def status(folder: Path) -> dict[str, Any]:
    return RunFolder.open(folder).summary()


def assert_sound(folder: Path) -> None:
    """Every checkpoint there is loads, is finite, and nothing lies beside it."""
    state = RunFolder.open(folder).state
    if state.exists():
        assert all(tensor.isfinite().all() for tensor in load_state(state)["model"].values())
    for path in folder.glob("checkpoints/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_weights(path).tensors.values())
        load_weights(path).model()
    assert not litter(folder)
