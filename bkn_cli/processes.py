"""`--nproc`: the same command in several processes of this machine, which find each other by a file of their user's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, NamedTuple

import typer

from bkn_cli.render import Reporter
from bkn_cli.reporting import FOLLOWS, UNEXPECTED, exit_code

_GRACE = 10.0  # seconds in which the others may end by themselves once one has failed
_PATIENCE = 60.0  # seconds in which all have to end once they were asked to
_GLANCE = 0.05


class Worker(NamedTuple):
    """A process and the files of what it says: standard output under --json, standard error beside the first."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]
    errors: IO[bytes]

    @property
    def was_killed(self) -> bool:
        """Whether it ended by a signal."""
        return (self.process.poll() or 0) < 0


def run_processes(reporter: Reporter, count: int) -> None:
    """Run this process's command in `count` processes and end as they end.

    The first one talks; another is heard only where it alone is the cause of a failure.
    """
    reporter.phase = "stepping"
    followed, _held = os.pipe()  # closed by the system when this process ends, however that ends
    with tempfile.TemporaryDirectory(prefix="bkn-") as folder:
        file = str(Path(folder) / "rendezvous")
        place = {**_loopback(), **os.environ, FOLLOWS: "1", "WORLD_SIZE": str(count), "BKN_RENDEZVOUS": file}
        workers = [_start(rank, place, followed, reporter.as_json) for rank in range(count)]
        try:
            failed = _wait(reporter, workers)
        finally:
            _kill(workers)
    speaker = workers[0]
    if failed is not None and (failed.was_killed or workers[0].process.returncode != failed.process.returncode):
        speaker = failed
    code = speaker.process.returncode
    if code < 0:
        rank = workers.index(speaker)
        hint = "Where a checkpoint was saved, `bkn train --resume RUN` goes on from it."
        reporter.fail("worker", UNEXPECTED, f"process {rank} was ended by signal {-code}", hint)
    _repeat(speaker.output, reporter.output.file)
    _repeat(speaker.errors, reporter.human.file)
    raise typer.Exit(code)


def follow_starter() -> None:
    """End this process, if it is one of several, when the one that started them has ended: after a save if it can."""
    if FOLLOWS not in os.environ:
        return

    def follow() -> None:
        os.read(sys.stdin.fileno(), 1)  # nothing is ever written there
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_PATIENCE)
        os._exit(exit_code(signal.SIGTERM))

    threading.Thread(target=follow, daemon=True).start()


def _start(rank: int, place: dict[str, str], followed: int, as_json: bool) -> Worker:
    output, errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (they outlive this function)
    process = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],  # with `-m` instead, modules of the working folder would come first
        env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        stdin=followed,
        stdout=output if as_json or rank else None,
        stderr=errors if rank else None,
        process_group=0,  # a Ctrl-C of the terminal reaches this process alone, which hands it on once
    )
    return Worker(process, output, errors)


def _wait(reporter: Reporter, workers: list[Worker]) -> Worker | None:
    """Wait for all and return the one that failed first, if any; signals to this process are handed on."""
    failed, deadline, told = None, float("inf"), False
    while any(worker.process.poll() is None for worker in workers):
        if reporter.signal is not None and not told:
            told = True
            for worker in workers:
                worker.process.send_signal(reporter.signal)
                worker.process.send_signal(signal.SIGCONT)  # one that is stopped would not hear
            deadline = time.monotonic() + _PATIENCE
        if failed is None:
            failed = next((worker for worker in workers if worker.process.poll()), None)
            if failed is not None:  # the others cannot go on without one that was killed, and need not say so
                deadline = time.monotonic() + (0.0 if failed.was_killed else _GRACE)
        if time.monotonic() > deadline:
            _kill(workers)
        time.sleep(_GLANCE)
    return failed or next((worker for worker in workers if worker.process.returncode), None)


def _kill(workers: list[Worker]) -> None:
    for worker in workers:
        worker.process.kill()
        worker.process.wait()


def _repeat(words: IO[bytes], target: IO[str]) -> None:
    words.seek(0)
    target.write(words.read().decode(errors="replace"))
    target.flush()


def _loopback() -> dict[str, str]:
    """Return what keeps the processes' exchange on this machine, where the user has not named an interface."""
    name = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    return {} if name is None else {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
