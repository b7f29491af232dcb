"""Tests of cells side by side: the order of results, what ends a process, and going on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bkn_core.compare import jobs
from bkn_core.compare.cells import Cell, CellEnded, CellMoved, CellStarted
from bkn_core.compare.matrix import compare
from bkn_core.engine.run_folder import RunFolder
from bkn_core.errors import InterruptedRun

TINY = [
    "data.train_images=64",
    "data.test_images=32",
    "data.image_size=8",
    "train.epochs=1",
    "train.device=cpu",
    "batch.gradient=32",
]
AXES: dict[str, Any] = {"norms": ["bn", "ln"], "statistics_batch_sizes": [32]}


@pytest.mark.slow
def test_cells_side_by_side_are_those_one_after_the_other(tmp_path: Path) -> None:
    events: list[Any] = []
    together = compare(None, TINY, out=tmp_path / "together", jobs=2, on_event=events.append, **AXES)
    alone = compare(None, TINY, out=tmp_path / "alone", **AXES)
    assert [(cell.norm, cell.top1, cell.loss) for cell in together.cells] == [
        (cell.norm, cell.top1, cell.loss) for cell in alone.cells
    ]
    assert all(cell.parameters and cell.peak_memory for cell in together.cells)
    kinds = [type(event) for event in events]
    assert kinds[:2] == [CellStarted, CellStarted]
    assert kinds.count(CellEnded) == 2 and set(kinds) <= {CellStarted, CellMoved, CellEnded}


@pytest.mark.slow
def test_a_killed_process_is_told_in_its_cell_and_goes_on_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[jobs._Job] = []
    ordinary = jobs._Job.listen

    def listen(self: jobs._Job, on_event: Any) -> None:
        if self not in started:
            started.append(self)
            if self.turn.index == 1:
                os.kill(self.process.pid or 0, signal.SIGKILL)
        ordinary(self, on_event)

    monkeypatch.setattr(jobs._Job, "listen", listen)
    result = compare(None, TINY, out=tmp_path, jobs=2, **AXES)
    assert [(cell.norm, cell.status, cell.code) for cell in result.cells] == [
        ("bn", "failed", "worker"),
        ("ln", "finished", ""),
    ]
    assert result.cells[0].message == "its process was ended by signal 9 (SIGKILL)"
    monkeypatch.setattr(jobs._Job, "listen", ordinary)
    events: list[Any] = []
    again = compare(None, TINY, out=tmp_path, jobs=2, on_event=events.append, **AXES)
    assert [cell.status for cell in again.cells] == ["finished", "finished"]
    assert [event.reused for event in events if isinstance(event, CellStarted)] == [True, False]


@pytest.mark.slow
def test_a_request_to_stop_saves_all_runs_and_leaves_no_process(tmp_path: Path) -> None:
    moved: set[int] = set()

    def note(event: Any) -> None:
        if isinstance(event, CellMoved):
            moved.add(event.index)

    words = [*TINY[:3], "train.epochs=100000", *TINY[4:]]
    with pytest.raises(InterruptedRun, match="stopped and saved: bn-g32-s32-seed0, ln-g32-s32-seed0") as caught:
        compare(None, words, out=tmp_path, jobs=2, on_event=note, should_stop=lambda: len(moved) == 2, **AXES)
    assert "same command" in caught.value.hint
    for name in ("bn", "ln"):
        folder = RunFolder(tmp_path / "cells" / f"{name}-g32-s32-seed0")
        assert (folder.status, folder.state.is_file()) == ("interrupted", True)


KILLED = """
import multiprocessing, os, signal, sys
from bkn_core.compare.cells import CellMoved
from bkn_core.compare.matrix import compare

def tell(event):
    if isinstance(event, CellMoved) and event.index == 3:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

axes = {"norms": ["bn", "ln", "gn"], "statistics_batch_sizes": [32]}
compare(None, sys.argv[2:], jobs=2, out=sys.argv[1], on_event=tell, **axes)
"""


def is_running(process: str) -> bool:
    state = Path("/proc", process, "stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="sees processes as Linux shows them")
def test_a_killed_comparison_goes_on_at_once_and_leaves_no_process(tmp_path: Path) -> None:
    """The third run has begun, so one at least has ended; what was running saves and ends by itself."""
    words = [*TINY, "train.epochs=5"]
    command = [sys.executable, "-c", KILLED, str(tmp_path), *words]
    killed = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600)
    left = killed.stdout.split()
    assert killed.returncode == -signal.SIGKILL and left
    rows = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/metrics.jsonl")}
    finished = {path for path in rows if RunFolder(path.parent).status == "finished"}
    events: list[Any] = []
    axes = {**AXES, "norms": ["bn", "ln", "gn"]}
    result = compare(None, words, out=tmp_path, jobs=2, on_event=events.append, **axes)
    assert [cell.status for cell in result.cells] == ["finished"] * 3
    assert finished and all(path.stat().st_mtime_ns == rows[path] for path in finished)
    assert sum(event.reused for event in events if isinstance(event, CellStarted)) >= len(finished)
    assert not any(map(is_running, left))


class Spoken:
    """A pipe that has said some things and ends there."""

    def __init__(self, *told: Any) -> None:
        self.told = [*told]

    def poll(self) -> bool:
        return True

    def recv(self) -> Any:
        if not self.told:
            raise EOFError
        return self.told.pop(0)


class Ended:
    """A process that has ended."""

    def __init__(self, code: int) -> None:
        self.exitcode = code

    def join(self) -> None:
        pass


class Failing:
    """A turn whose cell is its error."""

    @staticmethod
    def failed(error: Exception) -> Exception:
        return error


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-9, "its process was ended by signal 9 (SIGKILL)"),
        (-15, "its process was ended by signal 15 (SIGTERM)"),
        (3, "its process ended without a result, with exit code 3"),
    ],
)
def test_a_process_without_a_result_says_how_it_ended(code: int, words: str) -> None:
    job: Any = object.__new__(jobs._Job)
    job.cell, job.turn, job.process, job.ours = None, Failing, Ended(code), Spoken("moved")
    heard: list[Any] = []
    job.listen(heard.append)
    assert heard == ["moved"]
    assert (type(job.cell), job.cell.message) == (jobs.WorkerError, words)


def test_a_result_counts_however_its_process_ends() -> None:
    cell = Cell("bn", 32, 2, 0, "finished", Path())
    job: Any = object.__new__(jobs._Job)
    job.cell, job.turn, job.process, job.ours = None, Failing, Ended(-9), Spoken(cell)
    job.listen(lambda event: None)
    assert job.cell is cell
