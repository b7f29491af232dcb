"""Tests of what runs cost: steps and seconds to a target, speed and memory against the reference."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from made_runs import make_run

from bkn_core.compare.cells import Cell
from bkn_core.compare.costs import with_costs
from bkn_core.compare.report import publish


def run(path: Path, words: list[str], top1: list[float], *, speed: float, memory: int | None) -> Cell:
    """A finished run of epochs of ten steps and two seconds."""
    cell = make_run(path, words)
    rows = [
        {"kind": "epoch", "step": 10 * i, "epoch": i, "seconds": 2.0 * i, "population_top1": value}
        for i, value in enumerate(top1, 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dataclasses.replace(cell, images_per_second=speed, peak_memory=memory, parameters=100)


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    """Two seeds of bn and bkn; the second seed of bkn does not reach the best of bn."""
    bn, bkn = ["norm.kind=bn", "batch.statistics=32"], ["norm.kind=bkn"]
    return [
        run(tmp_path / "a", bn, [0.5, 0.7, 0.6], speed=100.0, memory=2**20),
        run(tmp_path / "b", [*bn, "train.seed=1"], [0.5, 0.6, 0.8], speed=200.0, memory=None),
        run(tmp_path / "c", bkn, [0.7, 0.6, 0.9], speed=50.0, memory=2**21),
        run(tmp_path / "d", [*bkn, "train.seed=1"], [0.5, 0.6, 0.7], speed=50.0, memory=2**22),
    ]


def test_the_target_is_the_best_epoch_of_the_reference_of_the_same_seed(cells: list[Cell]) -> None:
    costed = with_costs(cells, None)
    assert [(cell.target, cell.steps_to_target, cell.seconds_to_target) for cell in costed] == [
        (0.7, 20, 4.0),
        (0.8, 30, 6.0),
        (0.7, 10, 2.0),
        (0.8, None, None),
    ]
    assert [cell.relative_images_per_second for cell in costed] == [1.0, 1.0, 0.5, 0.25]
    assert [cell.relative_peak_memory for cell in costed] == [1.0, None, 2.0, None]


def test_a_target_that_is_given_is_the_same_for_all(cells: list[Cell]) -> None:
    assert [cell.steps_to_target for cell in with_costs(cells, 0.6)] == [20, 20, 10, 20]


def test_runs_of_earlier_versions_have_steps_but_no_seconds_to_a_target(tmp_path: Path) -> None:
    (cell,) = with_costs([make_run(tmp_path, ["norm.kind=gn"])], 0.0)
    assert (cell.steps_to_target, cell.seconds_to_target, cell.parameters, cell.peak_memory) == (1, None, None, None)


def test_costs_are_in_the_report(cells: list[Cell], tmp_path: Path) -> None:
    result = publish(tmp_path / "out", cells)
    row = result.summary[1]
    assert (row.parameters, row.relative_images_per_second, row.reached) == (100, 0.375, 1)
    lines = [[part.strip() for part in line.split("|")] for line in result.artifacts["table"].read_text().splitlines()]
    assert ["", "bkn s=2", "100", "0.38", "3", "2.00", "10 (1 of 2)", "2.0", ""] in lines
    assert json.loads(result.artifacts["json"].read_text())["cells"][2]["steps_to_target"] == 10
