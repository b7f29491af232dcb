"""`bkn compare`: the matrix it asks for, its table, its JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from calls import TINY, call

import bkn_core
from bkn_core.compare import matrix


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
    ordinary = matrix.train

    def train(recipe: bkn_core.Recipe, **options: Any) -> Any:
        if recipe.norm.kind == "bn":
            raise bkn_core.errors.DivergedError("step 3: the loss is not finite")
        return ordinary(recipe, **options)

    monkeypatch.setattr(matrix, "train", train)
    words = ("compare", *TINY, "--norms", norms, "--statistics-batch-sizes", "2", "--out", "out")
    result = call(*words, "--json")
    document = json.loads(result.stdout)
    count = norms.count(",") + 1
    assert (result.exit_code, document["ok"], document["error"]["code"]) == (6, False, "diverged")
    assert document["error"]["message"].startswith(f"1 of {count} runs did not finish, such as bn-g16-s2-seed0: step 3")
    assert [cell["status"] for cell in document["result"]["cells"]] == ["finished", "diverged"][2 - count :]
    assert Path(document["artifacts"]["table"]).is_file()
    assert "0, 1 diverged" in call(*words).stdout
