"""What can be watched while a run goes on: table, curves, summary and TensorBoard's events, each epoch."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import stop_at, tiny

from bkn_core.engine.events import EpochEnded
from bkn_core.engine.loop import train
from bkn_core.engine.run_folder import RunFolder
from bkn_core.errors import InterruptedRun, OutputError, RecipeError


class Writer:
    """A stand-in for TensorBoard's writer: what was flushed can be seen, by file."""

    files: list[list[tuple[str, float, int]]]

    def __init__(self, path: str, *, purge_step: int) -> None:
        assert purge_step == 1  # with what older files say
        Path(path).mkdir(exist_ok=True)
        self.files.append([])
        self.waiting: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.waiting.append((tag, value, step))

    def flush(self) -> None:
        self.files[-1] += self.waiting
        self.waiting = []

    close = flush


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, float, int]]]:
    """The scalars of each event file."""
    Writer.files = []
    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)  # type: ignore[arg-type]
    return Writer.files


def scalars(folder: Path) -> list[tuple[str, float, int]]:
    rows = RunFolder(folder).records()
    return [
        (f"{row['kind']}/{key}", value, row["step"])
        for row in rows
        for key, value in row.items()
        if key not in ("kind", "step", "epoch") and value is not None
    ]


def test_without_tensorboard_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RecipeError, match=r"log\.tensorboard is true, but .*\npip install tensorboard"):
        train(tiny("log.tensorboard=true"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_everything_can_be_read_when_an_epoch_ends(tmp_path: Path, files: list[Any]) -> None:
    folder, seen = tmp_path / "run", []

    def look(event: object) -> None:
        if isinstance(event, EpochEnded):
            with open(folder / "metrics.csv", newline="") as file:
                rows = len(list(csv.DictReader(file)))
            summary = json.loads((folder / "summary.json").read_text())
            assert files[-1] == scalars(folder)
            assert (folder / "plots" / "curves.png").is_file()
            seen.append((rows, summary["status"], summary["step"], "population" in summary["results"]))

    train(tiny("log.tensorboard=true", "log.plots=true"), out=folder, on_event=look)
    assert seen == [(1, "running", 3, True), (2, "running", 6, True)]


def test_a_run_that_goes_on_begins_a_file_with_all_of_its_rows(tmp_path: Path, files: list[Any]) -> None:
    recipe, folder = tiny("log.tensorboard=true", "log.every=1"), tmp_path / "run"
    with pytest.raises(InterruptedRun):
        train(recipe, out=folder, should_stop=stop_at(2))
    assert files == [scalars(folder)] and {step for _, _, step in files[0]} == {1, 2}
    train(recipe, resume=folder)
    assert len(files) == 2 and files[1] == scalars(folder)


def test_events_that_cannot_be_written_are_an_error_with_their_place(
    tmp_path: Path, files: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Writer) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Writer, "flush", full)
    with pytest.raises(OutputError, match=r"run/tensorboard could not be written: no space left"):
        train(tiny("log.tensorboard=true"), out=tmp_path / "run")


def test_tensorboard_itself_reads_the_events(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe, folder = tiny("log.tensorboard=true", "log.every=1"), tmp_path / "run"
    with pytest.raises(InterruptedRun):
        train(recipe, out=folder, should_stop=stop_at(2))
    train(recipe, resume=folder)
    events = reading.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("step/loss")] == [1, 2, 3, 4, 5, 6]


def test_the_environment_tells_command_commits_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.setattr(sys, "orig_argv", ["bkn", "train", "my recipe.yaml"])
    train(tiny("train.epochs=1"), out=tmp_path / "run")
    found = json.loads((tmp_path / "run" / "env.json").read_text())
    assert (found["command"], found["commit"]) == ("bkn train 'my recipe.yaml'", commit)
    assert found["data"]["training"]["images"] == 36
    assert "on cpu by bkn train 'my recipe.yaml'\n" in (tmp_path / "run" / "train.log").read_text()
