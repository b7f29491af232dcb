"""Every key of a recipe does something: another value, and the run is another one."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import BaseModel
from tiny_runs import CLOCK, bits
from torch import Tensor, nn
from torchvision import datasets
from torchvision.models import WeightsEnum

from bkn_core.data import sources, splits
from bkn_core.data.preprocess import Preprocess
from bkn_core.engine.build import build_model
from bkn_core.engine.checkpoint import load_state
from bkn_core.engine.loop import train
from bkn_core.engine.models import build_network
from bkn_core.engine.run_folder import RunFolder, run_name
from bkn_core.errors import BknError
from bkn_core.recipe import CompareConfig, Recipe, load_recipe

SMALL = (
    "model.name=cifar_plain",
    "batch.gradient=8",
    "batch.per_device=4",
    "data.train_images=20",
    "data.test_images=10",
    "data.image_size=8",
    "train.epochs=1",
    "train.device=cpu",
    "eval.batch_size=10",
    "log.every=1",
    "log.plots=false",
)
# What those keys need that only masks know.
MASKS = (
    "task=segmentation",
    "data.name=scenes",
    "data.train_images=8",
    "data.test_images=2",
    "model.name=unet",
    "model.args={width: 2, depth: 2}",
)
# The word that changes each key, and those without which it would have nothing to do.
CASES: dict[str, tuple[str, ...]] = {
    "name": ("other",),
    "task": ("segmentation",),
    "data.scale": ("[0.5, 2]", *MASKS),
    "data.jitter": ("0.5", *MASKS),
    "train.loss": ("dice", *MASKS),
    "norm.kind": ("gn",),
    "norm.transition": ("learned",),
    "norm.message": ("raw",),
    "norm.covariance": ("full", "norm.transition=learned"),
    "norm.gain": ("0.3",),
    "norm.learn_gain": ("false", "norm.gain=0.3"),
    "norm.gain_schedule": ("constant",),
    "norm.correction": ("true",),
    "norm.innovation": ("false",),
    "norm.input_prior": ("false",),
    "norm.eps": ("0.1",),
    "norm.momentum": ("0.5",),
    "norm.weights": ("centred",),
    "batch.gradient": ("4",),
    "batch.statistics": ("4",),
    "batch.per_device": ("2",),
    "data.name": ("CIFAR10",),
    "data.root": ("other.npz",),
    "data.image_size": ("9",),
    "data.resize": ("crop", "data.image_size=[8, 6]"),
    "data.train_images": ("16",),
    "data.test_images": ("8",),
    "data.validation": ("0.01",),
    "data.augment": ("flip",),
    "data.rand_augment": ("9",),
    "data.mixup": ("1.0",),
    "data.cutmix": ("1.0",),
    "data.download": ("true", "data.name=CIFAR10"),
    "train.epochs": ("2",),
    "train.seed": ("1",),
    "train.device": ("cuda:99",),
    "train.amp": ("true",),
    "train.compile": ("true",),
    "train.channels_last": ("false",),
    "train.ema": ("0.5",),
    "train.clip_norm": ("0.1",),
    "train.label_smoothing": ("0.1",),
    "train.class_weights": ("[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]",),
    "train.patience": ("1", "data.validation=0.01", "optim.lr=1e-9", "train.epochs=3"),
    "train.workers": (
        "3",
        "data.name=imagefolder",
        "data.root=photos",
        "data.train_images=null",
        "data.test_images=null",
    ),
    "train.deterministic": ("true",),
    "train.nonfinite": ("skip", "optim.lr=1e30"),
    "optim.name": ("adamw",),
    "optim.lr": ("0.01",),
    "optim.momentum": ("0.5",),
    "optim.nesterov": ("false",),
    "optim.weight_decay": ("0.1",),
    "optim.norm_weight_decay": ("0.1",),
    "optim.gain_lr_scale": ("9", "norm.gain=0.3"),
    "optim.schedule": ("cosine",),
    "optim.warmup": ("0.5",),
    "optim.milestones": ("[0.9]", "optim.schedule=multistep"),
    "optim.gamma": ("0.5", "optim.schedule=multistep"),
    "eval.batch_size": ("5",),
    "eval.stats": ("both",),
    "eval.topk": ("[3]",),
    "log.every": ("2",),
    "log.tensorboard": ("true",),
    "log.plots": ("true",),
    "model.name": ("mnasnet0_75", "model.name=mnasnet0_5"),
    "model.pretrained": ("true", "model.name=mnasnet0_5"),
    "model.args": ("{dropout: 0.9}", "model.name=mnasnet0_5"),
}
SINGLE = {"version"}  # there is one version
COMPARED = {f"compare.{key}" for key in CompareConfig.model_fields}  # tests/compare/test_compare_axes.py


def keys_of(section: type[BaseModel], place: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys_of(kind, f"{name}.")
        else:
            yield place + name


def observed_model(recipe: Recipe) -> dict[str, Any]:
    """The network that is built where training it would take long."""
    images = splits.ImageSet(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.arange(2), ("a", "b"))
    model = build_model(recipe, Preprocess("RGB", (32, 32), (0.0,) * 3, (1.0,) * 3), 2, images=images)
    return {"modules": repr(model), "weights": model.get_buffer("layers.1.running_mean").tolist()}


def observed_run(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """All that a run leaves behind, but for its recipe and its clocks, and what its model was given."""
    inputs: list[Any] = []
    threads: list[int] = []

    def pool(count: int) -> ThreadPoolExecutor:
        threads.append(count)
        return ThreadPoolExecutor(count)

    def look(module: nn.Module, words: tuple[Any, ...]) -> None:
        if isinstance(words[0], Tensor) and words[0].dim() == 4:
            modes = hasattr(module, "compiled"), torch.are_deterministic_algorithms_enabled()
            inputs.append((words[0].shape, words[0].stride(), *modes))

    handle = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "ThreadPoolExecutor", pool)
            train(recipe, out=folder)
    except BknError as error:
        return {"error": str(error)}
    finally:
        handle.remove()
    run = RunFolder.open(folder)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    state = {key: value for key, value in load_state(run.state).items() if key != "recipe"}
    return {
        "inputs": inputs,
        "threads": threads,
        "files": files,
        "name": run_name(recipe),
        **plain({"state": state, "rows": run.records()}),
    }


def pretrained() -> dict[str, Tensor]:
    """Weights that no network starts with."""
    network = build_network("mnasnet0_5", classes=2)
    for tensor in network.state_dict().values():
        tensor.fill_(3)
    return network.state_dict()


def plain(value: Any) -> Any:
    """The same with lists in the place of tensors, and without clocks."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in CLOCK}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return bits(value).numpy().tobytes() if isinstance(value, Tensor) else value


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Any]]]:
    """Observe the run of some words; the same words once."""
    folder = tmp_path_factory.mktemp("runs")
    draw = np.random.default_rng(0)
    for name in ("one", "other"):
        pixels = {f"{split}_images": draw.integers(0, 256, (20, 8, 8), dtype=np.uint8) for split in ("train", "test")}
        np.savez(folder / f"{name}.npz", **pixels, train_labels=np.arange(20) % 5, test_labels=np.arange(20) % 5)

    @functools.cache
    def observed(*words: str) -> dict[str, Any]:
        recipe = load_recipe(None, [*SMALL, *words])
        if recipe.model.name.startswith("mnasnet"):
            return observed_model(recipe)
        return observed_run(recipe, folder / str(len(list(folder.iterdir()))))

    for name in (f"photos/{split}/{kind}/{i}.png" for split in ("train", "test") for kind in "ab" for i in range(8)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / name)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no network here")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(splits, "open_digits", functools.cache(splits.open_digits))
        patch.setattr(datasets.CIFAR10, "download", fail)
        patch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: pretrained())
        patch.setattr(nn.Module, "compile", lambda model, **_: setattr(model, "compiled", True))
        yield observed


@pytest.mark.parametrize("key", sorted({*keys_of(Recipe)} - SINGLE - COMPARED))
def test_another_value_of_a_key_makes_another_run(runs: Any, key: str) -> None:
    value, *needed = CASES[key]
    assert runs(*needed, f"{key}={value}") != runs(*needed)
