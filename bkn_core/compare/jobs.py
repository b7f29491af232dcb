"""Cells side by side: each in a process of its own, so that what ends one ends no other."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

import torch

from bkn_core.compare.cells import Cell, CellMoved
from bkn_core.compare.turn import GO_ON, OnEvent, Turn, run_cell
from bkn_core.engine.events import Notice
from bkn_core.errors import BknError, InterruptedRun

_PATIENCE = 60.0  # seconds in which a process has to end once it was asked to
_GLANCE = 0.1
_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class WorkerError(BknError):
    """A process of a comparison ended without a result."""

    code = "worker"


def side_by_side(
    turns: Sequence[Turn], jobs: int, on_event: OnEvent, should_stop: Callable[[], bool]
) -> Iterator[tuple[Turn, Cell]]:
    """Run so many cells at a time, each with its share of this process's threads.

    Raises:
        InterruptedRun: `should_stop` said so; the runs are saved.
    """
    waiting, running = deque(turns), list[_Job]()
    threads = max(1, torch.get_num_threads() // jobs)
    try:
        while waiting or running:
            if should_stop():
                _stop(running)
            while waiting and len(running) < jobs:
                on_event(waiting[0].started(reused=False))
                running.append(_Job(waiting.popleft(), threads))
            connection.wait([job.ours for job in running], _GLANCE)
            for job in [*running]:
                job.listen(on_event)
                if job.cell is not None:
                    running.remove(job)
                    yield job.turn, job.cell
    finally:
        for job in running:
            job.process.kill()
            job.process.join()


def _stop(running: Sequence[_Job]) -> None:
    """Let all save and end."""
    for job in running:
        job.process.terminate()
    deadline = time.monotonic() + _PATIENCE
    for job in running:
        job.process.join(max(0.0, deadline - time.monotonic()))
    names = ", ".join(job.turn.planned.name for job in running)
    raise InterruptedRun(f"stopped and saved: {names}" if names else "stopped between two runs", GO_ON)


class _Job:
    """A process that runs a cell, and what it has told."""

    def __init__(self, turn: Turn, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.turn = turn
        self.cell: Cell | None = None
        self.ours, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(turn, threads, theirs), daemon=True)
        with _signals_wait():
            self.process.start()
        theirs.close()

    def listen(self, on_event: OnEvent) -> None:
        """Hand on what was told; a process that ended without a cell gets one that says so."""
        try:
            while self.ours.poll():
                told = self.ours.recv()
                if isinstance(told, Cell):
                    self.cell = told
                else:
                    on_event(told)
        except EOFError:
            self.process.join()
            self.cell = self.cell or self.turn.failed(WorkerError(_end(self.process.exitcode or 0), GO_ON))
        if self.cell is not None:
            self.process.join()


def _end(code: int) -> str:
    if code < 0:
        return f"its process was ended by signal {-code} ({signal.Signals(-code).name})"
    return f"its process ended without a result, with exit code {code}"


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Keep signals from a process that starts, until it can answer them; it inherits what is blocked here."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(turn: Turn, threads: int, pipe: connection.Connection) -> None:
    """Run a cell and tell how it ended: the whole life of a process."""
    asked = threading.Event()
    _heed_signals(asked)
    threading.Thread(target=_follow, args=(asked,), daemon=True).start()
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # what the user should heed comes as a notice
    told = 0.0

    def tell(event: Any) -> None:
        nonlocal told
        if isinstance(event, Notice):
            _send(pipe, Notice(f"{turn.planned.name}: {event.text}"))
        elif isinstance(event, CellMoved) and time.monotonic() - told > _GLANCE:
            told = time.monotonic()
            _send(pipe, event)

    try:
        cell = run_cell(turn, tell, asked.is_set)
    except InterruptedRun:
        return
    except Exception as error:  # a fault of one cell is none of the others
        cell = turn.failed(WorkerError(f"{type(error).__name__}: {error}"))
    _send(pipe, cell)


def _send(pipe: connection.Connection, told: Any) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        pipe.send(told)


def _heed_signals(asked: threading.Event) -> None:
    """Save and end at SIGTERM; Ctrl-C reaches the starter too, which asks in its own way."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)


def _follow(asked: threading.Event) -> None:
    """Save and end when the starter has ended, however that ended."""
    starter = multiprocessing.parent_process()
    if starter is not None:
        starter.join()
        asked.set()
        time.sleep(_PATIENCE)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
