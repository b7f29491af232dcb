"""Tests of comparing runs that are there already."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_runs import make_run

from bkn_core.compare.matrix import compare
from bkn_core.engine.locks import alone_in
from bkn_core.engine.run_folder import RunFolder
from bkn_core.errors import InputError, RecipeError


def test_finished_runs_are_read_and_nothing_is_trained(tmp_path: Path) -> None:
    made = [make_run(tmp_path / norm, [f"norm.kind={norm}"]) for norm in ("bn", "bkn")]
    result = compare([tmp_path / "bn", tmp_path / "bkn"], out=tmp_path / "report")
    assert [(cell.run, cell.top1, cell.loss) for cell in result.cells] == [
        (cell.run, cell.top1, cell.loss) for cell in made
    ]
    assert result.warnings == []
    assert sorted(path.name for path in result.out.iterdir()) == [
        "compare.csv",
        "compare.json",
        "curves.png",
        "report.html",
        "table.md",
    ]


def test_a_run_that_is_not_finished_is_named(tmp_path: Path) -> None:
    make_run(tmp_path / "good", ["norm.kind=bn"])
    make_run(tmp_path / "half", ["norm.kind=bkn"])
    for written, status in {"interrupted": "interrupted", "running": "killed"}.items():
        RunFolder(tmp_path / "half").write_summary(written, step=3)
        with pytest.raises(InputError, match=rf"half is not finished: it is {status}\nFinish it with"):
            compare([tmp_path / "good", tmp_path / "half"], out=tmp_path / "report")
    with alone_in(tmp_path / "half"), pytest.raises(InputError, match=r"it is running\nLet it end"):
        compare([tmp_path / "half"], out=tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "it is not there"),
        ("{}", "does not say how the run ended: its status is null"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_summary_that_is_lost_or_says_nothing_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    make_run(tmp_path / "run", ["norm.kind=bn"])
    summary = tmp_path / "run" / "summary.json"
    summary.unlink() if content is None else summary.write_text(content)
    with pytest.raises(InputError, match=rf"summary\.json .*{words}.*\n`bkn train --resume .*run` writes it anew"):
        compare([tmp_path / "run"], out=tmp_path / "report")


def test_a_damaged_recipe_of_a_run_is_named(tmp_path: Path) -> None:
    make_run(tmp_path / "run", ["norm.kind=bn"])
    (tmp_path / "run" / "config.yaml").write_text("norm: [")
    with pytest.raises(InputError, match=r"config\.yaml:\d.* not valid YAML"):
        compare([tmp_path / "run"], out=tmp_path / "report")


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere is no run folder"):
        compare([tmp_path / "nowhere"], out=tmp_path)


def test_no_run_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run to compare"):
        compare([], out=tmp_path)


def test_words_beside_finished_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"norm\.kind=bn"):
        compare([tmp_path], ["norm.kind=bn"], out=tmp_path)


def test_other_data_or_another_model_is_a_warning(tmp_path: Path) -> None:
    make_run(tmp_path / "a", ["norm.kind=bn"])
    make_run(tmp_path / "b", ["norm.kind=bkn", "data.train_images=50", "model.name=resnet18"])
    result = compare([tmp_path / "a", tmp_path / "b"], out=tmp_path / "report")
    assert result.warnings == [
        "the runs differ in model.name: cifar_resnet8, resnet18",
        "the runs differ in data.train_images: None, 50",
    ]
    assert "the runs differ in model.name" in result.artifacts["table"].read_text()


def test_runs_of_one_norm_with_other_settings_are_rows_of_their_own(tmp_path: Path) -> None:
    for name, words in {"a": [], "b": ["norm.gain=0.3"], "c": ["norm.gain=0.3", "train.seed=1"]}.items():
        make_run(tmp_path / name, ["norm.kind=bkn", *words])
    result = compare([tmp_path / name for name in "abc"], out=tmp_path / "report")
    assert [(row.label, row.n) for row in result.summary] == [
        ("bkn s=2 (norm.gain=auto)", 1),
        ("bkn s=2 (norm.gain=0.3)", 2),
    ]
    assert result.warnings == []


def test_the_same_seed_twice_is_a_warning(tmp_path: Path) -> None:
    for name in "ab":
        make_run(tmp_path / name, ["norm.kind=bkn"])
    result = compare([tmp_path / "a", tmp_path / "b", tmp_path / "a"], out=tmp_path / "report")
    assert len(result.cells) == 2
    assert result.warnings == [f"{tmp_path / 'a'} and {tmp_path / 'b'} are the same recipe and seed"]
