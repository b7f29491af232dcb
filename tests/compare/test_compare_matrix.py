"""Tests of running a matrix: order, events, taking up where it stopped, cells that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import fake_train

from bkn_core.compare import turn
from bkn_core.compare.cells import CellEnded, CellStarted
from bkn_core.compare.matrix import compare
from bkn_core.engine.events import EpochEnded, Stepped
from bkn_core.engine.locks import alone_in
from bkn_core.engine.run_folder import RunFolder
from bkn_core.errors import BusyError, DivergedError, InputError, InterruptedRun, RecipeError, StatisticsError
from bkn_core.recipe import Recipe

TINY = [
    "data.train_images=128",
    "data.test_images=64",
    "data.image_size=8",
    "train.epochs=1",
    "train.device=cpu",
    "batch.gradient=32",
]
Calls = list[tuple[str, str]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What a stand-in for training was called with."""
    made: Calls = []
    monkeypatch.setattr(turn, "train", fake_train(made))
    return made


def test_a_matrix_is_trained_cell_by_cell_and_reported(tmp_path: Path) -> None:
    events: list[Any] = []
    result = compare(None, TINY, norms=["bn", "bkn", "gn"], out=tmp_path, on_event=events.append)
    names = [cell.run.name for cell in result.cells]
    assert names == [f"{name}-seed0" for name in ("bn-g32-s2", "bn-g32-s32", "bkn-g32-s2", "bkn-g32-s32", "gn-g32-s2")]
    assert {tuple(cell.top1) for cell in result.cells} == {("population", "batch")}
    gn = result.cells[-1]
    assert gn.top1["population"] == gn.top1["batch"]
    assert [(c.row, c.reference) for c in result.comparisons[::2]] == [
        ("bn s=2", "bn s=32"),
        ("bkn s=2", "bn s=32"),
        ("bkn s=32", "bn s=32"),
        ("gn", "bn s=32"),
    ]
    assert json.loads((tmp_path / "compare.json").read_text())["summary"][4]["norm"] == "gn"
    kinds = [type(event) for event in events]
    assert kinds.count(EpochEnded) == kinds.count(CellStarted) == kinds.count(CellEnded) == 5
    assert kinds.count(Stepped) == 20
    assert (kinds[0], kinds[-1]) == (CellStarted, CellEnded)


def test_an_interrupted_matrix_goes_on_to_the_result_of_an_unbroken_one(tmp_path: Path) -> None:
    words = [*TINY, "train.epochs=2"]
    axes: dict[str, Any] = {"norms": ["gn"], "statistics_batch_sizes": [2], "seeds": 2}
    steps: list[Stepped] = []

    def count(event: object) -> None:
        if isinstance(event, Stepped):
            steps.append(event)

    unbroken = compare(None, words, out=tmp_path / "unbroken", on_event=count, **axes)
    with pytest.raises(InterruptedRun, match="seed1: stopped after step 5 of 8") as caught:
        compare(None, words, out=tmp_path / "broken", on_event=count, should_stop=lambda: len(steps) >= 16 + 13, **axes)
    assert "same command" in caught.value.hint
    assert [cell["seed"] for cell in json.loads((tmp_path / "broken" / "compare.json").read_text())["cells"]] == [0]
    assert "seed0" in (tmp_path / "broken" / "report.html").read_text()
    steps.clear()
    resumed = compare(None, words, out=tmp_path / "broken", on_event=count, **axes)
    assert len(steps) == 3
    assert [cell.loss for cell in resumed.cells] == [cell.loss for cell in unbroken.cells]


def test_groups_of_one_value_fail_their_cell_and_no_other(tmp_path: Path) -> None:
    # Images of 4x4 leave one value per channel in the last stage: too few for BatchNorm on one image at a time.
    result = compare(
        None, [*TINY, "data.image_size=4"], norms=["bn"], statistics_batch_sizes=[1, 32], seeds=1, out=tmp_path
    )
    assert [(cell.status, list(cell.top1)) for cell in result.cells] == [("failed", []), ("finished", ["population"])]
    assert "one value per channel" in result.cells[0].message
    again = compare(None, [*TINY, "data.image_size=4"], norms=["bn"], statistics_batch_sizes=[32], out=tmp_path)
    assert [(cell.run, cell.top1) for cell in again.cells] == [(cell.run, cell.top1) for cell in result.cells[1:]]


def test_the_same_call_again_takes_every_cell_as_it_is(tmp_path: Path, calls: Calls) -> None:
    first = compare(None, TINY, seeds=2, out=tmp_path)
    assert len(calls) == 8
    events: list[Any] = []
    again = compare(None, TINY, seeds=2, out=tmp_path, on_event=events.append)
    assert len(calls) == 8
    assert again == first
    assert [event.reused for event in events] == [True] * 16
    assert [event.index for event in events[::2]] == [*range(1, 9)]


def test_the_default_folder_is_named_after_the_recipe(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compare(norms=["ln"]).out == Path("runs/compare-digits_micro-digits-cifar_resnet8")


def test_more_seeds_train_only_what_is_new(tmp_path: Path, calls: Calls) -> None:
    compare(None, TINY, norms=["ln"], out=tmp_path)
    result = compare(None, TINY, norms=["ln"], seeds=3, out=tmp_path)
    assert [name for _, name in calls] == [f"ln-g32-s2-seed{seed}" for seed in range(3)]
    assert result.summary[0].n == 3


def test_a_cell_that_saved_a_state_is_resumed_and_one_that_did_not_begins_anew(tmp_path: Path, calls: Calls) -> None:
    axes: dict[str, Any] = {"norms": ["ln"], "seeds": 2, "out": tmp_path}
    cells = [cell.run for cell in compare(None, TINY, **axes).cells]
    for cell in cells:
        RunFolder(cell).write_summary("running")
    (cells[0] / "checkpoints").mkdir()
    (cells[0] / "checkpoints" / "last.state.pt").touch()
    (cells[1] / "left over").touch()
    calls.clear()
    compare(None, TINY, **axes)
    assert calls == [("resume", cells[0].name), ("out", cells[1].name)]
    assert not (cells[1] / "left over").exists()


def test_a_folder_that_another_process_compares_in_is_refused(tmp_path: Path, calls: Calls) -> None:
    with alone_in(tmp_path), pytest.raises(BusyError, match=f"{tmp_path} is in use"):
        compare(None, TINY, norms=["ln"], out=tmp_path)
    assert calls == []


def test_a_cell_that_another_process_trains_is_not_removed(tmp_path: Path, calls: Calls) -> None:
    cell = tmp_path / "cells" / "ln-g32-s2-seed0"
    with alone_in(cell), pytest.raises(BusyError, match=f"{cell} is in use"):
        compare(None, TINY, norms=["ln"], out=tmp_path)
    assert cell.exists() and calls == []


def test_a_cell_of_another_recipe_is_refused_before_anything_is_trained(tmp_path: Path, calls: Calls) -> None:
    compare(None, TINY, norms=["ln"], out=tmp_path)
    calls.clear()
    with pytest.raises(RecipeError, match=r"ln-g32-s2-seed0 .*: optim\.lr \(0\.1 there, 0\.2 wanted\)\n") as caught:
        compare(None, [*TINY, "optim.lr=0.2"], norms=["bn", "ln"], out=tmp_path)
    assert "--out" in caught.value.hint
    assert calls == []


def test_a_finished_cell_of_other_data_is_refused(tmp_path: Path) -> None:
    """Only its words stay the same: the file that they name was written anew."""
    root, random = tmp_path / "data.npz", np.random.default_rng(0)
    arrays = {f"{part}_images": random.integers(0, 256, (32, 8, 8), dtype=np.uint8) for part in ("train", "test")}
    arrays |= {f"{part}_labels": np.arange(32) % 4 for part in ("train", "test")}
    np.savez(root, **arrays)
    words = ["data.name=npz", f"data.root={root}", "train.epochs=1", "train.device=cpu", "batch.gradient=32"]
    first = compare(None, words, norms=["ln"], out=tmp_path / "out")
    assert compare(None, words, norms=["ln"], out=tmp_path / "out").cells == first.cells
    np.savez(root, **{**arrays, "test_images": arrays["test_images"][::-1]})
    with pytest.raises(InputError, match=r"ln-g32-s2-seed0: the data .*: other content of the test images\n.*--out"):
        compare(None, words, norms=["ln"], out=tmp_path / "out")


def test_a_diverged_cell_is_recorded_and_the_others_go_on(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary = turn.train

    def train(recipe: Recipe, **options: Any) -> Any:
        if recipe.norm.kind == "none":
            raise DivergedError("step 3: the loss is not finite")
        return ordinary(recipe, **options)

    monkeypatch.setattr(turn, "train", train)
    result = compare(None, TINY, norms=["none", "ln"], out=tmp_path)
    assert [(cell.status, cell.message) for cell in result.cells] == [
        ("diverged", "step 3: the loss is not finite"),
        ("finished", ""),
    ]
    assert json.loads((tmp_path / "compare.json").read_text())["cells"][0]["status"] == "diverged"


def test_a_failure_that_no_other_measure_mends_is_not_tried_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def train(recipe: Recipe, **options: Any) -> Any:
        tried.append(recipe.eval.stats)
        raise StatisticsError("a statistics group has one value per channel")

    monkeypatch.setattr(turn, "train", train)
    compare(None, TINY, norms=["bn", "brn"], statistics_batch_sizes=[1], out=tmp_path)
    assert tried == ["both", "population", "population"]


def test_damaged_cells_are_named_and_the_others_are_compared(tmp_path: Path, calls: Calls) -> None:
    files = ["predictions.npz", "predictions.npz", "summary.json", "metrics.jsonl", "env.json", "config.yaml"]
    norms = ["ln", "gn", "in", "none", "cbn", "brn", "frn"]
    compare(None, TINY, norms=norms, statistics_batch_sizes=[2], out=tmp_path)
    calls.clear()
    cut, empty, summary, metrics, data, recipe = (tmp_path / "cells" / f"{norm}-g32-s2-seed0" for norm in norms[:6])
    (cut / "predictions.npz").write_bytes((cut / "predictions.npz").read_bytes()[:100])
    np.savez(empty / "predictions.npz", labels=[], population_predictions=[], population_losses=[])
    values = {**RunFolder(summary).summary(), "results": {"population": {"top1": "high"}}}
    (summary / "summary.json").write_text(json.dumps(values))
    (metrics / "metrics.jsonl").write_text("1\n")
    (data / "env.json").write_text('{"data": 3}')
    (recipe / "config.yaml").write_text("norm: [")
    cells = compare(None, TINY, norms=norms, statistics_batch_sizes=[2], out=tmp_path).cells
    assert [cell.status for cell in cells] == ["failed"] * 6 + ["finished"]
    assert calls == []
    for cell, name in zip(cells, files, strict=False):
        assert cell.message.startswith(str(cell.run / name)) and "pydantic" not in cell.message
        assert cell.hint == f"Remove {cell.run}, and the same command trains it again."


def test_a_begun_cell_with_a_damaged_state_says_what_to_remove(tmp_path: Path) -> None:
    steps: list[object] = []
    with pytest.raises(InterruptedRun):
        compare(None, TINY, norms=["ln"], out=tmp_path, on_event=steps.append, should_stop=lambda: len(steps) > 3)
    cell = tmp_path / "cells" / "ln-g32-s2-seed0"
    (cell / "checkpoints" / "last.state.pt").write_bytes(b"x")
    with pytest.raises(InputError, match=rf"last\.state\.pt is damaged .*\nRemove {cell}, and the same command"):
        compare(None, TINY, norms=["ln"], out=tmp_path)


def test_a_finished_cell_without_its_recipe_is_not_taken_for_that_of_another(tmp_path: Path, calls: Calls) -> None:
    (cell,) = compare(None, TINY, norms=["ln"], out=tmp_path).cells
    (cell.run / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"ln-g32-s2-seed0/config.yaml does not exist\nRemove .* trains it again"):
        compare(None, [*TINY, "optim.lr=0.2"], norms=["ln"], out=tmp_path)
