"""Runs whose disk, checkpoint or values go bad: what is saved stays sound, and the run goes on from it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import FULL, assert_same_run, assert_sound, status, stop_at, tiny, train_in_parts

from bkn_core.engine import loop, records
from bkn_core.engine.checkpoint import load_state
from bkn_core.engine.events import EpochEnded, Event, Notice
from bkn_core.engine.loop import train
from bkn_core.engine.run_folder import RunFolder
from bkn_core.engine.training import Training
from bkn_core.errors import BknError, DivergedError, InputError, InterruptedRun, OutputError

# A run of two steps writes some fifteen files.
WRITES = [n if n in (2, 6, 9, 11) else pytest.param(n, marks=pytest.mark.slow) for n in range(1, 20)]


@pytest.mark.parametrize("word", ["optim.lr=0.2", "batch.statistics=1", "train.ema=0.5", "optim.name=adamw"])
def test_a_run_does_not_go_on_by_another_recipe(tmp_path: Path, word: str) -> None:
    with pytest.raises(InterruptedRun):
        train(tiny(), out=tmp_path / "run", should_stop=stop_at(1))
    before = (tmp_path / "run" / "checkpoints" / "last.state.pt").read_bytes()
    with pytest.raises(InputError, match=word.split("=")[0]):
        train(tiny(word), resume=tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "last.state.pt").read_bytes() == before


def test_a_damaged_state_is_not_resumed_from(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        train(tiny(), out=tmp_path / "run", should_stop=stop_at(1))
    path = tmp_path / "run" / "checkpoints" / "last.state.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"last\.state\.pt is damaged"):
        train(tiny(), resume=tmp_path / "run")
    assert status(tmp_path / "run")["status"] == "interrupted"


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        train(tiny("data.name=npz", f"data.root={tmp_path}/nowhere"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(tiny("train.epochs=1"), out=tmp_path / "run")
    assert status(tmp_path / "run")["status"] == "finished"


def diverge_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    take_step = Training.take_step

    def poisoned(self: Training, epoch: int, passes: Any) -> Any:
        hook = self.model.get_submodule("features.3").register_forward_hook(lambda _, __, y: y / 0)
        if self.step + 1 != step:
            hook.remove()
        try:
            return take_step(self, epoch, passes)
        finally:
            hook.remove()

    monkeypatch.setattr(Training, "take_step", poisoned)


def test_a_diverged_run_keeps_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diverge_at(5, monkeypatch)
    with pytest.raises(DivergedError, match=r"step 5 \(epoch 2\): the output of layer features\.3") as caught:
        train(tiny(), out=tmp_path / "run")
    assert "The last checkpoint is sound." in caught.value.hint
    assert status(tmp_path / "run")["status"] == "failed" and "features.3" in status(tmp_path / "run")["message"]
    assert load_state(tmp_path / "run" / "checkpoints" / "last.state.pt")["step"] == 3
    assert_sound(tmp_path / "run")


def test_a_run_that_skips_says_so_and_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diverge_at(2, monkeypatch)
    events: list[Event] = []
    recipe = tiny("train.nonfinite=skip", "train.epochs=1")
    train(recipe, out=tmp_path / "straight", on_event=events.append)
    assert [e.text for e in events if isinstance(e, Notice)] == [
        "step 2 (epoch 1): the output of layer features.3 is not finite; the step is skipped"
    ]
    train_in_parts(recipe, tmp_path / "parts", (2,))
    assert_same_run(tmp_path / "parts", tmp_path / "straight")
    assert_sound(tmp_path / "straight")


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("nth", WRITES)
def test_a_write_fault_anywhere_leaves_a_sound_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, nth: int
) -> None:
    """The disk is full from the n-th write on, then has room again."""
    whole, calls = getattr(os, call), 0

    def full(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(*arguments)

    monkeypatch.setattr(os, call, full)
    recipe = tiny("data.train_images=4", "data.test_images=10", "eval.batch_size=10")
    try:
        train(recipe, out=tmp_path / "run")
    except OutputError as error:
        assert str(tmp_path / "run") in error.message and "No space left" in error.message
    else:
        assert calls < nth
    monkeypatch.undo()
    if (tmp_path / "run" / "config.yaml").exists():
        assert_sound(tmp_path / "run")
        train(recipe, resume=tmp_path / "run")
        assert status(tmp_path / "run")["status"] == "finished"
        assert [row["epoch"] for row in RunFolder.open(tmp_path / "run").records() if row["kind"] == "epoch"] == [1, 2]


def test_an_epoch_that_was_recorded_but_not_saved_is_recorded_once(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(records, "save_predictions", lambda *_: (_ for _ in ()).throw(OutputError("full")))
    with pytest.raises(OutputError):
        train(tiny(*FULL), out=tmp_path / "run")
    assert any(row["kind"] == "epoch" for row in RunFolder.open(tmp_path / "run").records())
    monkeypatch.undo()
    train(tiny(*FULL), resume=tmp_path / "run")
    assert_same_run(tmp_path / "run", straight)


def test_a_torn_last_line_of_the_metrics_is_written_again(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')
    train(tiny(*FULL), resume=tmp_path / "run")
    assert_same_run(tmp_path / "run", straight)
    assert all(json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("nth", [3, 4])
def test_a_run_that_died_within_its_last_save_ends_with_the_weights_of_its_state(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """Each of the two epochs saves twice under `last`: the last epoch dies before the first or the second of them."""
    replace, calls = os.replace, 0

    def die(source: Path, target: Path) -> None:
        nonlocal calls
        calls += target.name.startswith("last.")
        if calls == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OutputError):
        train(tiny(*FULL), out=tmp_path / "run")
    monkeypatch.undo()
    train(tiny(*FULL), resume=tmp_path / "run")
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize("lose", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_finished_run_gets_the_weights_of_its_state_again(straight: Path, tmp_path: Path, lose: Any) -> None:
    shutil.copytree(straight, tmp_path / "run")
    lose(tmp_path / "run" / "checkpoints" / "last.safetensors")
    train(tiny(*FULL), resume=tmp_path / "run")
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize(
    ("error", "ended"),
    [(KeyboardInterrupt(), "interrupted"), (SystemExit(1), "failed"), (BrokenPipeError("no"), "failed")],
)
def test_a_run_says_how_it_ended_whatever_ended_it(tmp_path: Path, error: BaseException, ended: str) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, EpochEnded):
            raise error

    with pytest.raises(type(error)):
        train(tiny(), out=tmp_path / "run", on_event=fail)
    summary = status(tmp_path / "run")
    assert (summary["status"], summary["step"]) == (ended, 3)
    assert type(error).__name__ in summary["message"]


def test_every_error_is_one_of_ours(tmp_path: Path) -> None:
    for words in (["data.train_images=99999"], ["model.args={nonsense: 1}"]):
        with pytest.raises(BknError):
            train(tiny(*words), out=tmp_path / words[0])
        assert not (tmp_path / words[0]).exists()
