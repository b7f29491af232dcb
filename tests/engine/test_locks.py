"""One process at a time in a run folder, and no lock that outlives its process."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import tiny

from bkn_core.engine import loop
from bkn_core.engine.events import Event, Notice
from bkn_core.engine.locks import alone_in
from bkn_core.engine.loop import train
from bkn_core.engine.run_folder import RunFolder
from bkn_core.errors import BusyError, InputError, OutputError

HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""
SMALL = ("train.epochs=1", "data.train_images=8")


def test_another_process_keeps_out_until_it_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / ".lock")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(BusyError, match=f"{tmp_path} is in use by another process"), alone_in(tmp_path):
            pass
        process.kill()
    with alone_in(tmp_path) as is_alone:
        assert is_alone and (tmp_path / ".lock").exists()


def test_a_run_that_says_running_is_killed_where_nobody_is_in_its_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_summary("running", step=3)
    assert run.status == "killed" and run.summary()["step"] == 3
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / ".lock")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        assert run.status == "running"
        process.kill()
    assert run.status == "killed"
    with alone_in(tmp_path):
        assert run.status == "running"


def test_a_run_on_a_file_system_without_locks_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with alone_in(tmp_path):
        pass
    RunFolder(tmp_path).write_summary("running")
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    assert RunFolder(tmp_path).status == "running"


def test_whoever_is_inside_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("process 1 on an older and longer name of a machine " * 3)
    with alone_in(tmp_path), pytest.raises(BusyError, match=rf"in use by process {os.getpid()} on \S+\n"):
        alone_in(tmp_path).__enter__()


def test_a_run_is_not_resumed_while_it_goes_on(straight: Path) -> None:
    before = (straight / "metrics.jsonl").stat().st_mtime_ns
    with alone_in(straight), pytest.raises(BusyError, match="is in use by process"):
        train(RunFolder.open(straight).recipe, resume=straight)
    assert (straight / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("is_over", [True, False])
def test_of_two_runs_that_begin_in_one_folder_the_second_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_over: bool
) -> None:
    """Both have found the folder empty; the first one begins, and perhaps ends, while the second is preparing."""
    prepare, taken = loop.Training, alone_in(tmp_path / "run")

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr(loop, "Training", prepare)
        if is_over:
            train(tiny(*SMALL), out=tmp_path / "run")
        else:
            taken.__enter__()
        return prepare(*arguments)

    monkeypatch.setattr(loop, "Training", overtaken)
    with pytest.raises(InputError if is_over else BusyError):
        train(tiny("train.seed=7"), out=tmp_path / "run")
    assert not is_over or RunFolder.open(tmp_path / "run").recipe == tiny(*SMALL)


def test_a_file_system_without_locks_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    events: list[Event] = []
    train(tiny(*SMALL), out=tmp_path / "run", on_event=events.append)
    told = [e.text for e in events if isinstance(e, Notice) and "locks" in e.text]
    assert told == [f"{tmp_path / 'run'} lies on a file system without locks: start no second process in it"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file/run cannot be used: .*Not a directory"):
        train(tiny(*SMALL), out=tmp_path / "file" / "run")
