"""What goes wrong: each with its exit code, the name of the culprit, no traceback, one JSON object."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import TINY, call

import bkn_core
from bkn_cli.app import app
from bkn_core.engine.locks import alone_in
from bkn_core.ops import kernels

Refuse = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("exit_code", "words", "named"),
    [
        (2, ("train", "nosuch"), "'nosuch'"),
        (2, ("train", "norm.knid=bn"), "norm.knid"),
        (2, ("train", "optim.lr=nan"), "optim.lr"),
        (2, ("train", "digits_micro", "cifar10_smoke"), "'cifar10_smoke'"),
        (2, ("train", "model.name=resnet1", *TINY), "'resnet1'"),
        (2, ("train", "--resume", "x", "digits_micro"), "'digits_micro'"),
        (3, ("train", "nosuch.zip"), "nosuch.zip (in "),
        (2, ("train", "a.zip", "b.npz"), "'data.root=\"b.npz\"'"),
        (2, ("train", "--resume", "x", "--out", "y"), "'--out y'"),
        (2, ("train", "--out", ""), "path is empty"),
        (2, ("train", "--resume="), "path is empty"),
        (2, ("train", ""), "is empty"),
        (2, ("eval", ""), "is empty"),
        (2, ("compare", "--out", ""), "path is empty"),
        (2, ("export", ""), "path is empty"),
        (2, ("export", "model.onnx", "--run", ""), "path is empty"),
        (2, ("train", "--out", "b\udcff"), r"b\udcff holds a byte that is no UTF-8 text"),
        (2, ("eval", "b\udcff"), r"b\udcff holds a byte that is no UTF-8 text"),
        (2, ("eval", "a", "b"), "'b'"),
        (2, ("compare", "--norms", "nosuch"), "nosuch"),
        (2, ("compare", "--statistics-batch-sizes", "2,x"), "'2,x'"),
        (2, ("compare", "runs/a", "runs/b", "--seeds", "2"), "--seeds"),
        (2, ("export", "model.txt"), "model.txt"),
        (3, ("train", "nosuch.yaml"), "nosuch.yaml"),
        (3, ("train", "data.name=imagefolder", "data.root=nosuch"), "nosuch"),
        (3, ("train", "--resume", "nosuch"), "nosuch"),
        (3, ("eval",), "runs/"),
        (3, ("eval", "nosuch"), "nosuch"),
        (3, ("eval", "nosuch.onnx"), "nosuch.onnx"),
        (3, ("compare", "runs/a", "runs/b"), "runs/a"),
        (3, ("export", "model.onnx"), "runs/"),
        (3, ("export", "model.ONNX"), "runs/"),
        (3, ("eval", "nosuch.ONNX"), "nosuch.ONNX cannot be read"),
        (3, ("export", "model.onnx", "--run", "nosuch"), "nosuch"),
    ],
)
def test_the_culprit_is_named(refuse: Refuse, exit_code: int, words: tuple[str, ...], named: str) -> None:
    assert named in refuse(exit_code, *words)["message"]


def test_a_link_in_the_place_of_the_runs_that_leads_nowhere_is_no_endless_search(refuse: Refuse) -> None:
    Path("runs").symlink_to("nowhere")
    assert "cannot be made" in refuse(8, "train", *TINY)["message"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "config.yaml"])
def test_a_pipe_in_a_run_is_not_waited_for(refuse: Refuse, run: Path, name: str) -> None:
    shutil.copytree(run, "runs/one")
    Path("runs/one", name).unlink()
    os.mkfifo(Path("runs/one", name))
    words = {"metrics.jsonl": ("train", "--resume", "runs/one"), "summary.json": ("eval",)}
    assert refuse(3, *words.get(name, ("compare", "runs/one", str(run))))["message"]


def test_too_little_memory_is_the_machines_limit_and_no_fault_of_ours(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bkn_core, "evaluate", lambda *_, **__: torch.empty(2**60))
    assert "out of memory: " in refuse(5, "eval")["message"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("verb", ["train", "eval"])
def test_a_missing_device_is_exit_code_five(refuse: Refuse, run: Path, verb: str) -> None:
    target = TINY if verb == "train" else (str(run),)
    assert "cuda" in refuse(5, verb, *target, "--device", "cuda")["message"]


@pytest.mark.parametrize("place", ["taken", "taken/inside"])
@pytest.mark.parametrize("verb", ["train", "compare"])
def test_a_file_in_the_place_of_the_folder_is_refused(refuse: Refuse, verb: str, place: str) -> None:
    Path("taken").write_text("")
    assert place in refuse(8, verb, *TINY, "--out", place)["message"]


def test_a_run_that_diverges_before_its_first_save_does_not_speak_of_one(refuse: Refuse) -> None:
    assert "No checkpoint was saved before." in refuse(6, "train", *TINY, "optim.lr=1e30")["hint"]


def test_a_run_is_not_overwritten(refuse: Refuse, run: Path) -> None:
    assert "--resume" in refuse(3, "train", *TINY, "--out", str(run))["hint"]


def test_a_folder_in_use_is_exit_code_seven(refuse: Refuse, run: Path) -> None:
    with alone_in(run):
        assert str(run) in refuse(7, "train", "--resume", str(run))["message"]
        refuse(7, "compare", *TINY, "--out", str(run))


@pytest.mark.parametrize("verb", ["eval", "export"])
def test_a_flipped_bit_is_found(refuse: Refuse, run: Path, inside: Path, verb: str) -> None:
    shutil.copytree(run, "run")
    weights = Path("run/checkpoints/last.safetensors")
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    words = ("eval", "run") if verb == "eval" else ("export", "model.onnx", "--run", "run")
    assert "last.safetensors" in refuse(3, *words)["message"]
    assert not Path("model.onnx").exists()


def test_a_damaged_state_is_not_resumed(refuse: Refuse, run: Path, inside: Path) -> None:
    shutil.copytree(run, "run")
    Path("run/checkpoints/last.state.pt").write_bytes(b"nonsense")
    assert "last.state.pt" in refuse(3, "train", "--resume", "run")["message"]


def test_an_onnx_file_cut_short_is_refused(refuse: Refuse) -> None:
    Path("cut.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
    assert "cut.onnx" in refuse(3, "eval", "cut.onnx")["message"]


def test_a_folder_in_the_place_of_the_output_is_refused(refuse: Refuse, run: Path) -> None:
    Path("model.onnx").mkdir()
    assert "model.onnx" in refuse(8, "export", "model.onnx", "--run", str(run))["message"]


def test_an_unexpected_error_shows_its_traceback_only_when_asked(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*positional: Any, **options: Any) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(bkn_core, "evaluate", evaluate)
    short, long = call("eval"), call("eval", "--verbose")
    assert (short.exit_code, long.exit_code) == (1, 1)
    assert "ZeroDivisionError: oh" in short.stderr
    assert "Traceback" not in short.stderr
    assert "Traceback" in long.stderr


def test_a_compiler_that_is_no_command_is_noted(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", 'gcc "')
    kernels.library.cache_clear()
    result = call("train", *TINY, "--dry-run", "--json")
    kernels.library.cache_clear()
    assert result.exit_code == 0
    assert "CC is 'gcc \"'" in json.loads(result.stdout)["warnings"][0] and "CC is 'gcc \"'" in result.stderr


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_a_full_disk_behind_standard_output_is_told_once(
    run: Path, inside: Path, words: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full, pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.stdout", full)
        app(["eval", str(run), *words])
    assert end.value.code == 8
    assert capfd.readouterr().err.count("error: the output cannot be written: [Errno 28]") == 1
