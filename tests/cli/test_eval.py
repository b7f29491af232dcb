"""`bkn eval`: targets, kinds of statistics, its JSON object."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from calls import call
from rich.console import Console

import bkn_core

eval_verb: Any = importlib.import_module("bkn_cli.eval")


def test_a_run_measures_as_its_training_did(answer: dict[str, Any], run: Path) -> None:
    result = json.loads(call("eval", str(run), "--json").stdout)["result"]
    for name in ("top1", "loss", "images"):
        assert result[name] == pytest.approx(answer["result"][name])


def test_both_kinds_of_statistics_have_their_own_measures(run: Path) -> None:
    document = json.loads(call("eval", str(run), "--stats", "both", "--json").stdout)
    result, artifacts = document["result"], document["artifacts"]
    assert {"top1", "loss"} <= result["population"].keys() & result["batch"].keys()
    assert result["top1"] == result["population"]["top1"]
    for kind, file in (("population", artifacts["classes"]), ("batch", artifacts["batch_classes"])):
        rows = result["classes"][kind]
        found = sum(row["recall"] * row["support"] for row in rows if row["support"])
        assert found / result[kind]["images"] == pytest.approx(result[kind]["top1"])
        with open(file, newline="") as text:
            written = [row["recall"] for row in csv.DictReader(text)]
        assert written == ["" if row["recall"] is None else str(row["recall"]) for row in rows]
    words = call("eval", str(run), "--stats", "both").stdout
    assert "by population statistics" in words and "by batch statistics" in words


def test_mixtures_of_statistics_are_a_table_and_a_part_of_the_json(run: Path) -> None:
    table = call("eval", str(run), "--stats", "mixtures").stdout
    result = json.loads(call("eval", str(run), "--stats", "mixtures", "--json").stdout)["result"]
    assert "group: 2 images together, as in training" in table and result["statistics_batch_size"] == 2
    for name, words in (
        ("population", "population"),
        ("population_mean_group_variance", "population mean, group variance"),
        ("group_mean_population_variance", "group mean, population variance"),
        ("group", "group"),
    ):
        line = next(line for line in table.splitlines() if line.startswith(f"│ {words:<31} │"))
        assert f" {100 * result[name]['top1']:.2f} " in line and f" {result[name]['loss']:.4f} " in line


def test_the_quality_of_priors_is_a_table_and_a_part_of_the_json(run: Path, tmp_path: Path) -> None:
    checkpoint = str(shutil.copy(run / "checkpoints" / "best.safetensors", tmp_path / "some.safetensors"))
    table = call("eval", checkpoint, "--priors").stdout
    document = json.loads(call("eval", checkpoint, "--priors", "--json").stdout)
    rows = document["result"]["priors"]["layers"]
    assert {"refined", "analytic", "local", "prior", "reason", "channels"} <= rows[0].keys()
    for row in rows:
        line = next(line for line in table.splitlines() if f" {row['name']} " in line)
        assert f"{row['refined']['log_variance_ratio']:+z.2f} ± {row['refined']['spread']:.2f}" in line
        assert f"{row['refined']['mean_error']:.3f}" in line
        gains = [line for line in table.splitlines() if f" {row['name']} " in line][1]  # of the second table
        assert ", ".join(f"{value:.2f}" for value in row["gain"]["implied"]) in gains
        assert ", ".join(f"{value:.3f}" for value in row["gain"]["error"]) in gains
    assert all(Path(document["artifacts"][name]).is_file() for name in ("priors", "priors_plot"))


def test_a_checkpoint_measures_as_its_run(run: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copy(run / "checkpoints" / "best.safetensors", tmp_path / "some.safetensors")
    ours, theirs = (json.loads(call("eval", str(t), "--json").stdout)["result"] for t in (checkpoint, run))
    assert ours["loss"] == theirs["loss"]


def test_the_newest_finished_run_is_the_default(run: Path, inside: Path) -> None:
    for name, age in (("new", 0), ("old", 1000)):
        shutil.copytree(run, inside / "runs" / name)
        summary = inside / "runs" / name / "summary.json"
        os.utime(summary, (summary.stat().st_mtime - age,) * 2)
    result = call("eval")
    assert result.exit_code == 0
    assert "runs/new (PyTorch on" in result.stdout
    assert "test images: digits\n" in result.stdout
    assert "runs/new/evaluation.npz" in result.stderr


def test_options_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def evaluate(*target: Any, **options: Any) -> None:
        seen.extend([*target, options])
        raise bkn_core.errors.InputError("enough")

    monkeypatch.setattr(bkn_core, "evaluate", evaluate)
    result = call("eval", "m.onnx", "data.root=x=y.zip", "--stats", "batch", "--batch-size", "7", "--device", "cpu")
    assert result.exit_code == 3
    assert seen == [
        "m.onnx",
        {"stats": "batch", "batch_size": 7, "device": "cpu", "overrides": ["data.root=x=y.zip"], "priors": False},
    ]


def test_names_of_classes_are_shown_as_they_are() -> None:
    row = SimpleNamespace(name="[bold]x[/]", precision=0.5, recall=1.0, support=3)
    table = eval_verb._classes(SimpleNamespace(rows=[row], statistics="population", unit="images", files={}))
    with (console := Console(width=80, file=io.StringIO())).capture() as shown:
        console.print(table)
    assert "[bold]x[/]" in shown.get()
