"""Whole runs: stopping and going on, what they leave behind, and what a fault in the middle leaves standing."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    FULL,
    STEPS,
    assert_same_bits,
    assert_same_run,
    assert_sound,
    status,
    stop_at,
    tiny,
    train_in_parts,
)

from bkn_core.engine import loop, records
from bkn_core.engine.checkpoint import load_state, load_weights
from bkn_core.engine.events import EpochEnded, Event, Started, Stepped
from bkn_core.engine.loop import train
from bkn_core.engine.run_folder import RunFolder
from bkn_core.engine.tasks.classification import Metrics
from bkn_core.engine.training import Training
from bkn_core.errors import InputError, InterruptedRun, RecipeError

ADAM = ("optim.name=adamw", "optim.lr=0.01", "train.clip_norm=1.0", "norm.transition=learned", "batch.per_device=16")


# Asked after steps 1, 2, 3, then before two batches of each of two evaluations, then after steps 4, 5, 6 ...
@pytest.mark.parametrize(
    "stops",
    [
        (3,),
        (4,),
        (12,),
        (1, 1, 1, 1),
        (3, 3, 4),
        *(pytest.param(s, marks=pytest.mark.slow) for s in [(1,), (6,), (10,)]),
    ],
    ids=lambda stops: " then ".join(str(n) for n in stops),
)
def test_a_run_in_parts_equals_the_run_that_never_stopped(
    straight: Path, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    result = train_in_parts(tiny(*FULL), tmp_path / "run", stops)
    assert result.steps == STEPS
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize("words", [ADAM, ("norm.kind=brn", "optim.schedule=multistep")], ids=str)
def test_other_recipes_resume_to_the_same_bits(tmp_path: Path, words: tuple[str, ...]) -> None:
    recipe = tiny(*words, "train.epochs=1")
    train(recipe, out=tmp_path / "straight")
    train_in_parts(recipe, tmp_path / "parts", (1, 2))
    assert_same_run(tmp_path / "parts", tmp_path / "straight")


@pytest.mark.slow
def test_a_network_with_dropout_resumes_to_the_same_bits(tmp_path: Path) -> None:
    words = ("model.name=mobilenet_v3_small", "data.image_size=32", "data.train_images=20", "norm.kind=bn")
    train(tiny(*words), out=tmp_path / "straight")
    train_in_parts(tiny(*words), tmp_path / "parts", (1,))
    assert_same_run(tmp_path / "parts", tmp_path / "straight")


@pytest.mark.slow
def test_stopping_at_every_chance_ends_at_the_same_bits(tmp_path: Path) -> None:
    """Each evaluation is let through, because one that always stops never ends."""
    words = ("eval.batch_size=40",)
    train(tiny(*words), out=tmp_path / "straight")
    train_in_parts(tiny(*words), tmp_path / "parts", (1, 1, 1, 2, 1, 1, 1))
    assert_same_run(tmp_path / "parts", tmp_path / "straight")


def test_a_finished_run_that_is_resumed_stays_as_it_is(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    again = train(tiny(*FULL), resume=tmp_path / "run")
    assert again.steps == STEPS and set(again.metrics) == {"population", "batch"}
    assert_same_run(tmp_path / "run", straight)
    assert status(tmp_path / "run")["status"] == "finished"


def test_a_stopped_run_says_where_it_stands_and_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun, match=r"after step 2 of 6, which is saved\nContinue with .*--resume") as caught:
        train(tiny(), out=tmp_path / "run", should_stop=stop_at(2))
    assert caught.value.exit_code == 130
    summary = status(tmp_path / "run")
    assert (summary["status"], summary["step"], summary["steps"]) == ("interrupted", 2, 6)
    assert load_state(tmp_path / "run" / "checkpoints" / "last.state.pt")["step"] == 2
    assert_sound(tmp_path / "run")


def test_a_long_epoch_is_saved_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_SAVE_SECONDS", 0.0)
    saved: list[int] = []
    save = records.Records.save
    monkeypatch.setattr(records.Records, "save", lambda self, run: (saved.append(run.step), save(self, run))[1])
    train(tiny("train.epochs=1", "eval.batch_size=40"), out=tmp_path / "run")
    assert saved == [1, 2, 3, 3, 3]


def test_what_a_run_leaves_and_tells(tmp_path: Path) -> None:
    events: list[Event] = []
    result = train(tiny("log.plots=true"), out=tmp_path / "run", on_event=events.append)
    assert [type(e) for e in events] == [Started, *2 * [Stepped, Stepped, Stepped, EpochEnded]]
    assert [e.step for e in events if isinstance(e, Stepped)] == [1, 2, 3, 4, 5, 6]
    assert [e.images for e in events if isinstance(e, Stepped)] == [16, 16, 4] * 2
    found = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    names = {
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "metrics.csv",
        "summary.json",
        "train.log",
        "predictions.npz",
        ".lock",
    }
    files = {"last.safetensors", "best.safetensors", "last.state.pt"}
    assert found == names | {f"checkpoints/{name}" for name in files} | {"plots/curves.png"}
    summary = status(tmp_path / "run")
    assert (
        summary["status"] == "finished" and summary["results"]["population"] == result.metrics["population"].summary()
    )
    rows = RunFolder.open(tmp_path / "run").records()
    assert [row["step"] for row in rows if row["kind"] == "step"] == [2, 4, 6]
    assert RunFolder.open(tmp_path / "run").recipe == tiny("log.plots=true")
    last = [event for event in events if isinstance(event, EpochEnded)][-1]
    assert (result.best_epoch, result.best) == (last.epoch, last.figures["population"])


def test_the_test_images_choose_no_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, worse = Training.measure, iter((0.9, 0.1))

    def measured(self: Training, *arguments: Any) -> dict[str, Metrics]:
        metrics = measure(self, *arguments)
        return {kind: dataclasses.replace(found, top1=next(worse)) for kind, found in metrics.items()}

    monkeypatch.setattr(Training, "measure", measured)
    result = train(tiny(), out=tmp_path / "run")
    assert (result.best_epoch, result.best) == (2, 0.1)
    run = RunFolder.open(tmp_path / "run")
    assert load_weights(run.best).digest == load_weights(run.weights).digest


def test_logged_losses_average_to_the_loss_of_the_epoch(tmp_path: Path) -> None:
    train(tiny("log.every=1", "data.train_images=32"), out=tmp_path / "run")
    rows = RunFolder.open(tmp_path / "run").records()
    for epoch in (1, 2):
        losses = [row["loss"] for row in rows if row["kind"] == "step" and row["epoch"] == epoch]
        (train_loss,) = [row["train_loss"] for row in rows if row["kind"] == "epoch" and row["epoch"] == epoch]
        assert sum(losses) / len(losses) == pytest.approx(train_loss, rel=1e-5)


def test_a_folder_may_be_given_as_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(InputError, match="holds a run already"):
        train(tiny(), out=str(tmp_path))


def test_folders_are_numbered_where_their_name_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tiny("train.epochs=1", "train.seed=5", "data.train_images=8")
    runs = [train(recipe).run for _ in range(3)]
    name = "digits_micro-digits-cifar_plain-bkn-g16-s2-seed5"
    assert runs == [Path("runs") / f"{name}{number}" for number in ("", "-2", "-3")]
    for run in runs[1:]:
        assert_same_run(run, runs[0])


def test_a_named_folder_that_holds_a_run_is_left_alone(tmp_path: Path, straight: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    with pytest.raises(InputError, match=r"holds a run already\nContinue it with .*--resume"):
        train(tiny(), out=straight)
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before
    with pytest.raises(InputError, match="is no run folder"):
        train(tiny(), resume=tmp_path)


def test_two_runs_in_threads_do_not_hear_each_other(tmp_path: Path) -> None:
    words = [("train.epochs=1", "train.seed=1", "train.ema=0.9"), ("train.epochs=1", "train.seed=2", "norm.kind=bn")]
    for i, recipe in enumerate(tiny(*w) for w in words):
        train(recipe, out=tmp_path / f"alone{i}")
    faults: list[BaseException] = []

    def work(i: int) -> None:
        try:
            train(tiny(*words[i]), out=tmp_path / f"together{i}")
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    for i in range(2):
        together, alone = (RunFolder.open(tmp_path / f"{how}{i}") for how in ("together", "alone"))
        assert load_weights(together.weights).digest == load_weights(alone.weights).digest
        assert_same_bits(together.records(), alone.records())


def test_a_run_leaves_the_settings_of_torch_as_they_were(tmp_path: Path) -> None:
    def settings() -> tuple[Any, ...]:
        threads, kind = torch.get_num_threads(), torch.get_default_dtype()
        return threads, kind, torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()

    before = settings()
    train(tiny("train.deterministic=true", "train.epochs=1"), out=tmp_path / "run")
    with pytest.raises(RecipeError):
        train(tiny("model.name=nonsense"), out=tmp_path / "other")
    assert settings() == before


def test_the_same_recipe_gives_the_same_run(straight: Path, tmp_path: Path) -> None:
    torch.manual_seed(4)
    torch.rand(7)
    train(tiny(*FULL), out=tmp_path / "run")
    assert_same_run(tmp_path / "run", straight)
    assert_same_bits(status(tmp_path / "run"), status(straight))
