"""`bkn export`: the file, the words, the values it hands on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from calls import call

import bkn_core


def test_the_file_is_written_checked_and_measures_like_its_run(run: Path, inside: Path, answer: dict[str, Any]) -> None:
    result = call("export", "my model.onnx", "--run", str(run), "--json")
    facts = json.loads(result.stdout)["result"]
    assert facts["sha256"] == hashlib.sha256((inside / "my model.onnx").read_bytes()).hexdigest()
    assert facts["top1_agreement"] == 1
    assert facts["max_abs"] < 1e-4
    assert "next: bkn eval 'my model.onnx'\n" in result.stderr
    measured = json.loads(call("eval", "my model.onnx", "--device", "cpu", "--json").stdout)["result"]
    assert measured["top1"] == pytest.approx(answer["result"]["top1"])
    assert measured["loss"] == pytest.approx(answer["result"]["loss"], rel=1e-5)


def test_latency_is_shown_in_words(run: Path, inside: Path) -> None:
    result = call("export", "m.onnx", "--run", str(run), "--benchmark")
    assert result.exit_code == 0
    assert "agrees with the unfolded model on" in result.stdout
    assert "latency at batch 1: median " in result.stdout


def test_options_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def export_onnx(output: Path, **options: Any) -> None:
        seen.extend([output, options])
        raise bkn_core.errors.CheckFailedError("file and model disagree", "No file was written.")

    monkeypatch.setattr(bkn_core, "export_onnx", export_onnx)
    words = ("--run", "r", "--stats", "batch", "--fold", "conv", "--precision", "fp16", "--opset", "20")
    result = call("export", "m.onnx", *words, "--device", "auto", "--benchmark")
    assert (result.exit_code, result.stdout) == (4, "")
    assert "error: file and model disagree\n  No file was written.\n" in result.stderr
    options = {"run": Path("r"), "stats": "batch", "fold": "conv", "precision": "fp16", "opset": 20}
    assert seen == [Path("m.onnx"), {**options, "benchmark": True, "device": "auto"}]
