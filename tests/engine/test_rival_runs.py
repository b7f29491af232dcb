"""Runs with other authors' normalizations: they stop anywhere and go on to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from tiny_runs import assert_same_run, tiny, train_in_parts, training

from bkn_core.data.batches import normalize
from bkn_core.engine.loop import train
from bkn_core.kinds import Rivals
from bkn_core.layers.rivals.groups import Rival

QUICK = ("mabn", "online", "reference")  # what has the most to remember


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in get_args(Rivals)]
)
def test_a_run_in_parts_equals_the_run_that_never_stopped(tmp_path: Path, kind: str) -> None:
    recipe = tiny(f"norm.kind={kind}", "train.epochs=1", "train.ema=0.9", "eval.stats=population")
    result = train(recipe, out=tmp_path / "straight")
    assert all(measured.loss < 10 for measured in result.metrics.values())
    train_in_parts(recipe, tmp_path / "parts", (1, 2))
    assert_same_run(tmp_path / "parts", tmp_path / "straight")


def test_layers_with_a_warm_up_know_the_length_of_the_run() -> None:
    found = training("norm.kind=mabn")
    layers = [module for module in found.model.modules() if isinstance(module, Rival)]
    assert len(layers) == 6
    assert {layer.length for layer in layers} == {2 * 5 * 4}  # epochs, passes, groups in a pass
    for passes in found.epoch(0):
        found.take_step(0, passes)
    counted = {
        int(layer.num_batches_tracked) for layer in layers if isinstance(layer.num_batches_tracked, torch.Tensor)
    }
    assert counted == {18}  # groups of two among 36 images


@pytest.mark.parametrize("kind", ["mabn", "online", "iternorm", "cbn", "reference"])
def test_all_processes_move_alike_what_layers_remember(kind: str) -> None:
    found = training(f"norm.kind={kind}")
    shared = {id(buffer) for buffer in found.shared}
    alone = {name.rpartition(".")[2] for name, buffer in found.model.named_buffers() if id(buffer) not in shared}
    assert alone == {"num_batches_tracked"} | ({"reference_images"} if kind == "reference" else set())


def test_the_reference_images_are_training_images_and_stay_so() -> None:
    found = training("norm.kind=reference")
    images = found.model.get_buffer("reference_images")
    inputs = normalize(found.splits.train.batch(torch.arange(36))[0], found.splits.preprocess)
    assert images.shape == (64, 1, 8, 8)
    assert all(any(torch.equal(image, known) for known in inputs) for image in images)
    before = images.clone()
    found.take_step(0, next(iter(found.epoch(0))))
    assert torch.equal(images, before)
