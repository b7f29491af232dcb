"""Runs that end when their validation images say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_runs import EPOCH_STEPS, assert_same_run, status, tiny, train_in_parts, training

from bkn_core.engine.build import load_splits
from bkn_core.engine.events import EpochEnded, Event, Notice
from bkn_core.engine.loop import train
from bkn_core.engine.run_folder import RunFolder
from bkn_core.errors import RecipeError

# With a learning rate of nothing no epoch is better than the first.
STALLED = ("data.validation=0.02", "optim.lr=1e-30", "train.epochs=9", "norm.kind=gn", "eval.batch_size=40")


@pytest.mark.parametrize("patience", [1, 2])
def test_a_run_ends_after_so_many_epochs_without_a_better_one(tmp_path: Path, patience: int) -> None:
    events: list[Event] = []
    result = train(tiny(*STALLED, f"train.patience={patience}"), out=tmp_path / "run", on_event=events.append)
    assert [e.epoch for e in events if isinstance(e, EpochEnded)] == list(range(1, patience + 2))
    assert (result.best_epoch, result.steps) == (1, (patience + 1) * EPOCH_STEPS)
    share = f"{100 * result.best:.2f} %"
    text = (
        f"stopped early after epoch {patience + 1}: none since epoch 1 had a better validation top-1 than its {share}"
    )
    assert events[-1] == Notice(text)
    summary = status(tmp_path / "run")
    assert (summary["status"], summary["message"]) == ("finished", text)
    assert summary["results"]["population"] == result.metrics["population"].summary()
    assert len([row for row in RunFolder.open(tmp_path / "run").records() if row["kind"] == "epoch"]) == patience + 1


def test_epochs_that_become_better_are_waited_for() -> None:
    run = training("train.patience=2", "data.validation=0.02")
    stalled = []
    for top1 in (0.2, 0.2, 0.3, 0.1, 0.3):
        run.end_epoch(top1)
        stalled.append(run.is_stalled)
    assert stalled == [False, False, False, False, True]


def test_a_run_that_ended_early_is_the_same_in_parts_and_stays_ended(tmp_path: Path) -> None:
    recipe = tiny(*STALLED, "train.patience=1")
    train(recipe, out=tmp_path / "straight")
    train_in_parts(recipe, tmp_path / "parts", (1, 5))
    assert_same_run(tmp_path / "parts", tmp_path / "straight")
    events: list[Any] = []
    train(recipe, resume=tmp_path / "parts", on_event=events.append)
    assert_same_run(tmp_path / "parts", tmp_path / "straight")
    assert not any(isinstance(event, EpochEnded) for event in events)
    assert Notice("the run has ended early after epoch 2: train.patience above 1 goes on") in events
    result = train(tiny(*STALLED, "train.patience=3"), resume=tmp_path / "parts", on_event=events.append)
    assert [e.epoch for e in events if isinstance(e, EpochEnded)] == [3, 4]
    assert result.steps == 4 * EPOCH_STEPS


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    events: list[Any] = []
    train(tiny("train.epochs=1"), out=tmp_path / "run")
    train(tiny("train.epochs=1"), resume=tmp_path / "run", on_event=events.append)
    assert Notice("the run has all of its 1 epochs: more train.epochs go on") in events


def test_images_that_the_data_hold_out_are_validation_images(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / split / name / "0.png")
    data = ("data.name=imagefolder", f"data.root={tmp_path}", "data.train_images=null", "data.test_images=null")
    assert load_splits(tiny(*data, "train.patience=3")).validation is not None


def test_without_validation_images_nothing_can_end_a_run_early() -> None:
    with pytest.raises(
        RecipeError, match=r"train.patience is 3, but there are no validation(.|\n)*data.validation=0.1"
    ):
        load_splits(tiny("train.patience=3"))


def test_patience_is_a_number_of_epochs() -> None:
    with pytest.raises(RecipeError, match=r"train.patience is 0; give an integer of at least 1, or null for none"):
        tiny("train.patience=0")
