"""`bkn compare`: the matrix it asks for, its table, its JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from calls import TINY, call

import bkn_core
from bkn_cli.progress import TrainingProgress
from bkn_cli.render import Reporter
from bkn_core.compare import turn
from bkn_core.compare.cells import Cell, CellEnded, CellMoved, CellStarted


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the library was asked for; it answers with an error."""
    seen: list[Any] = []

    def compare(*positional: Any, on_event: Any, should_stop: Any, **options: Any) -> None:
        seen.extend([*positional, options])
        raise bkn_core.errors.InputError("enough")

    monkeypatch.setattr(bkn_core, "compare", compare)
    return seen


def test_what_is_not_asked_for_is_left_to_the_library(asked: list[Any]) -> None:
    assert call("compare").exit_code == 3
    assert asked == [None, [], {"out": None}]


def test_lists_and_numbers_are_read(asked: list[Any]) -> None:
    call("compare", "digits_micro", "--norms", "bn, gn", "--statistics-batch-sizes", "2,16", "--seeds", "3", *TINY[:1])
    assert asked == [
        "digits_micro",
        ["train.epochs=1"],
        {"norms": ["bn", "gn"], "statistics_batch_sizes": [2, 16], "seeds": 3, "out": None},
    ]


def test_further_axes_are_read(asked: list[Any]) -> None:
    words = ("--lr", "0.05,1e-1", "--gradient-batch-sizes", "32, 64", "--models", "a,timm:b")
    call("compare", *words, "--target", "97.5", "--jobs", "2")
    options = {"learning_rates": [0.05, 0.1], "gradient_batch_sizes": [32, 64], "models": ["a", "timm:b"]}
    assert asked == [None, [], {**options, "target": 0.975, "jobs": 2, "out": None}]


def test_a_rate_that_is_no_number_is_refused(asked: list[Any]) -> None:
    result = call("compare", "--lr", "0.1,fast")
    assert (result.exit_code, asked) == (2, [])
    assert "--lr is '0.1,fast'" in result.stderr and "such as 0.05,0.1" in result.stderr


def test_several_recipes_are_compared(asked: list[Any]) -> None:
    call("compare", "digits_micro", "mine.yaml", "train.epochs=1", "--seeds", "2")
    assert asked == [["digits_micro", "mine.yaml"], ["train.epochs=1"], {"seeds": 2, "out": None}]


def test_missing_data_of_one_recipe_fail_its_runs_alone(inside: Path) -> None:
    Path("good.yaml").write_text("version: 1\n")
    Path("bad.yaml").write_text("version: 1\ndata: {root: missing.npz}\n")
    words = ("compare", "bad.yaml", "good.yaml", *TINY, "--norms", "ln", "--out", "out", "--json")
    result = call(*words)
    document = json.loads(result.stdout)
    assert (result.exit_code, document["error"]["code"]) == (3, "input")
    assert document["error"]["message"].startswith("1 of 2 runs did not finish, such as bad-ln-g16-s2-seed0: ")
    assert [(cell["recipe"], cell["status"]) for cell in document["result"]["cells"]] == [
        ("bad", "failed"),
        ("good", "finished"),
    ]
    alone = call("compare", "bad.yaml", *TINY, "--norms", "ln,gn", "--out", "alone")
    assert alone.exit_code == 3
    assert "error: data.root missing.npz" in alone.stderr  # which says the whole, not one run of several


def test_the_bar_of_all_runs_counts_those_that_were_not_there(tmp_path: Path) -> None:
    progress = TrainingProgress(Reporter("compare", as_json=True), jobs=2)
    cells = [Cell("bn", 16, 2, seed, "finished", tmp_path, {"population": 0.5}, {}, 100.0) for seed in range(4)]
    for index in (1, 2):
        progress(CellStarted(index, 4, "bn", 2, index, True))
        progress(CellEnded(index, 4, cells[index - 1], True))
    for event in (CellStarted(3, 4, "bn", 2, 2, False), CellStarted(4, 4, "bn", 2, 3, False)):
        progress(event)
    for event in (CellMoved(3, 4, 0.5), CellMoved(4, 4, 0.25), CellEnded(3, 4, cells[2], False)):
        progress(event)
    _, matrix = progress.bar.tasks
    assert (matrix.total, matrix.completed) == (2, 1.25)
    assert progress.reporter.phase == "stepping"  # a signal is to be heeded, not to end this process at once


def test_a_folder_of_pictures_is_data(asked: list[Any], tmp_path: Path) -> None:
    call("compare", str(tmp_path), "--norms", "bn")
    assert asked[:2] == [None, [f'data.root="{tmp_path}"']]


def test_folders_are_finished_runs(asked: list[Any], run: Path) -> None:
    call("compare", str(run), str(run))
    assert asked[0] == [run, run]


def test_a_matrix_ends_in_a_table_without_a_spread_of_one_seed(inside: Path) -> None:
    result = call("compare", *TINY, "--norms", "bkn", "--statistics-batch-sizes", "2", "--out", "out")
    assert result.exit_code == 0
    assert "bkn" in result.stdout
    assert "nan" not in result.stdout
    assert "run 1 of 1: bkn, s = 2, seed 0" in result.stderr
    assert (inside / "out" / "compare.json").is_file()
    assert "report: out/report.html" in result.stdout + result.stderr and (inside / "out" / "report.html").is_file()
    again = call("compare", *TINY, "--norms", "bkn", "--statistics-batch-sizes", "2", "--out", "out", "--json")
    document = json.loads(again.stdout)
    assert "already there" in again.stderr
    assert [cell["norm"] for cell in document["result"]["cells"]] == ["bkn"]
    assert document["result"]["summary"][0]["top1"]["population"]["sd"] is None


def test_what_all_runs_have_to_say_is_said_once(inside: Path) -> None:
    words = (*TINY, "batch.gradient=48", "--norms", "bn,brn", "--statistics-batch-sizes", "24", "--json")
    result = call("compare", *words)
    (note,) = json.loads(result.stdout)["warnings"]
    assert "the last step of each epoch has 16 images" in note
    assert [result.stderr.count(text) for text in (note, "64 training and 32 test images", "run folder: ")] == [1, 1, 2]


def test_finished_runs_are_set_side_by_side(run: Path, inside: Path) -> None:
    document = json.loads(call("compare", str(run), "--json").stdout)
    cell = document["result"]["cells"][0]
    assert cell["steps"] == 4 and cell["parameters"] > 0 and cell["peak_memory"] > 2**20
    assert (cell["norm"], cell["gradient"], cell["statistics"], cell["seed"]) == ("bkn", 16, 2, 0)
    assert Path(document["artifacts"]["table"]).is_file()


def test_finished_runs_get_a_report_of_their_own_each_time(run: Path, inside: Path) -> None:
    outs = [Path(json.loads(call("compare", str(run), "--json").stdout)["artifacts"]["table"]) for _ in range(2)]
    assert [path.parent.name for path in outs] == ["compare-finished", "compare-finished-2"]
    result = call("compare", str(run), "--out", str(outs[0].parent), "--json")
    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["message"]) == (3, f"{outs[0].parent} holds a comparison already")


@pytest.mark.parametrize("norms", ["bn", "none,bn"])
def test_runs_that_diverge_are_an_error_beside_what_there_is(
    inside: Path, monkeypatch: pytest.MonkeyPatch, norms: str
) -> None:
    ordinary = turn.train

    def train(recipe: bkn_core.Recipe, **options: Any) -> Any:
        if recipe.norm.kind == "bn":
            raise bkn_core.errors.DivergedError("step 3: the loss is not finite")
        return ordinary(recipe, **options)

    monkeypatch.setattr(turn, "train", train)
    words = ("compare", *TINY, "--norms", norms, "--statistics-batch-sizes", "2", "--out", "out")
    result = call(*words, "--json")
    document = json.loads(result.stdout)
    count = norms.count(",") + 1
    assert (result.exit_code, document["ok"], document["error"]["code"]) == (6, False, "diverged")
    assert document["error"]["message"].startswith(f"1 of {count} runs did not finish, such as bn-g16-s2-seed0: step 3")
    assert [cell["status"] for cell in document["result"]["cells"]] == ["finished", "diverged"][2 - count :]
    assert Path(document["artifacts"]["table"]).is_file()
    assert "0, 1 diverged" in call(*words).stdout
