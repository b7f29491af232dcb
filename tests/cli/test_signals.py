"""Ctrl-C and SIGTERM: exit codes, and checkpoints that go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import TINY, call

import bkn_core
from bkn_cli.progress import TrainingProgress
from bkn_core.engine.checkpoint import load_state

PROGRAM = "from bkn_cli.start import main; main()"
EARLY = """
import builtins, os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which tests under nohup would ignore
from bkn_cli.start import main
ordinary = builtins.__import__

def counted(name, *rest):
    if name == "typer":
        builtins.__import__ = ordinary
        os.kill(os.getpid(), int(sys.argv.pop(1)))
    return ordinary(name, *rest)

builtins.__import__ = counted
main()
"""
LONG = (*TINY[1:], "train.epochs=100000")


def state(run: Path) -> dict[str, Any]:
    return load_state(run / "checkpoints" / "last.state.pt")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_in_a_step_saves_it_and_the_run_goes_on(
    number: signal.Signals, code: int, run: Path, inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stepped(self: TrainingProgress, event: Any) -> None:
        if event.step == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    if before is signal.SIG_IGN:  # tests under nohup
        signal.signal(number, signal.SIG_DFL)
    with monkeypatch.context() as context:
        context.setattr(TrainingProgress, "_stepped", stepped)
        result = call("train", *TINY, "--out", "run", "--json")
    signal.signal(number, before)
    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["code"], error["exit"]) == (code, "interrupted", code)
    assert state(Path("run"))["step"] == 2
    assert "bkn train --resume run" in error["hint"]
    assert call("train", "--resume", "run").exit_code == 0
    ours, straight = (state(path)["model"] for path in (Path("run"), run))
    assert all(torch.equal(ours[name], straight[name]) for name in straight)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_outside_of_steps_ends_at_once(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(*positional: Any, **options: Any) -> None:
        os.kill(os.getpid(), number)
        raise AssertionError("went on")

    monkeypatch.setattr(bkn_core, "evaluate", evaluate)
    result = call("eval", "--json")
    assert (result.exit_code, json.loads(result.stdout)["error"]["exit"]) == (code, code)


def test_the_second_ctrl_c_does_not_wait_for_the_step(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stepped(self: TrainingProgress, event: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainingProgress, "_stepped", stepped)
    result = call("train", *TINY, "--out", "run")
    assert result.exit_code == 130
    assert "stopped at once" in result.stderr
    assert not Path("run/checkpoints").exists()
    assert json.loads(Path("run/summary.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_while_the_program_starts_is_answered_in_words(number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-c", EARLY, str(int(number)), "train", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, json.loads(done.stdout)["error"]["exit"]) == (code, code)
    assert done.stderr == "error: stopped at once\n  No file is left half-written.\n"


def test_handlers_are_as_before_afterwards(run: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    call("eval", str(run))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def start(*words: str, flags: Sequence[str] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, *flags, "-c", PROGRAM, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def stop_after_an_epoch(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Send a signal once an epoch is reported, and return standard output."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch"):
            process.send_signal(number)
            break
    return process.communicate(timeout=60)[0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_ends_with_one_json_object_and_a_checkpoint(inside: Path, number: signal.Signals, code: int) -> None:
    process = start("train", *LONG, "--out", "run", "--json")
    error = json.loads(stop_after_an_epoch(process, number))["error"]
    assert (process.returncode, error["exit"]) == (code, code)
    assert f"stopped after step {state(Path('run'))['step']} of" in error["message"]


def test_a_run_whose_words_nobody_reads_any_more_has_failed(inside: Path) -> None:
    process = start("train", *LONG, "--out", "run")
    assert process.stderr is not None and process.stdout is not None
    process.stderr.readline()
    process.stderr.close()
    assert process.wait(timeout=60) == 8
    assert json.loads(Path("run/summary.json").read_text())["message"].startswith("BrokenPipeError")
    process.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_two_processes_stop_at_the_same_step(inside: Path, number: signal.Signals, code: int) -> None:
    process = start("train", *LONG, "--out", "run", "--nproc", "2", "--json")
    error = json.loads(stop_after_an_epoch(process, number))["error"]
    assert (process.returncode, error["exit"]) == (code, code)
    assert f"stopped after step {state(Path('run'))['step']} of" in error["message"]


@pytest.mark.slow
def test_two_processes_train_and_speak_once(inside: Path) -> None:
    process = start("train", *TINY, "--out", "run", "--nproc", "2", "--json")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert json.loads(output)["result"]["run"] == "run"
    assert errors.count("run folder: run") == 1


@pytest.mark.slow
def test_an_error_of_all_processes_is_told_once(inside: Path) -> None:
    process = start("train", "nosuch", "--nproc", "2", "--json")
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, json.loads(output)["error"]["exit"]) == (2, 2)
    assert errors.count("error:") == 1


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_over(process: int) -> bool:
    """Whether a process is gone, or waits for nothing but its parent's notice."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_processes_end_with_the_one_that_started_them(inside: Path, number: signal.Signals, stopped: bool) -> None:
    process = start("train", *LONG, "--out", "run", "--nproc", "2")
    assert process.stderr is not None
    next(line for line in process.stderr if line.startswith("epoch"))
    workers = children(process)
    if stopped:
        os.kill(workers[1], signal.SIGSTOP)
    process.send_signal(number)
    process.communicate(timeout=60)
    end = time.monotonic() + 60
    while not all(map(is_over, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert all(map(is_over, workers))
    assert process.returncode == (-9 if number == signal.SIGKILL else 129)
    assert json.loads(Path("run/summary.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_an_error(inside: Path) -> None:
    process = start("train", *LONG, "--out", "run", "--nproc", "2", "--json")
    assert process.stderr is not None
    next(line for line in process.stderr if line.startswith("epoch"))
    os.kill(children(process)[1], signal.SIGKILL)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.count("error:") == 1, "the cause alone is told"
    assert json.loads(output)["error"]["message"] == "process 1 was ended by signal 9"
    assert state(Path("run"))["step"] > 0


def listening(pid: int) -> set[str]:
    """The addresses, in hexadecimal, on which a process waits for connections."""
    links = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()]
    table = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return {row[1].split(":")[0] for row in table if row[3] == "0A" and f"socket:[{row[9]}]" in links}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no list of sockets")
def test_processes_run_nothing_of_the_working_folder_and_listen_to_this_machine_only(inside: Path) -> None:
    Path("typer.py").write_text("open('planted', 'w')")
    process = start("train", *LONG, "--out", "run", "--nproc", "2", "--json", flags=["-P"])
    assert process.stderr is not None
    next(line for line in process.stderr if line.startswith("epoch"))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    addresses = set().union(*(listening(int(child)) for child in children))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert addresses == {"0100007F"}
    assert process.returncode == 130 and not Path("planted").exists()
