"""Tests of the table, the picture and the JSON of a comparison."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import make_run
from matplotlib.figure import Figure
from PIL import Image

from bkn_core.compare.cells import Cell
from bkn_core.compare.report import publish
from bkn_core.engine.plots import NORM_COLORS
from bkn_core.engine.run_folder import RunFolder
from bkn_core.kinds import KINDS


def read_table(text: str) -> list[dict[str, str]]:
    """The first Markdown table of a text."""
    lines = [[part.strip() for part in line.strip("|\n").split("|")] for line in text.split("\n\n")[0].splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def failed(norm: str, size: int) -> Cell:
    return Cell(norm, 32, size, 0, "diverged", Path("cells") / norm, message="step 3: the loss is not finite")


def test_the_table_has_mean_and_deviation_in_percent_for_every_mode(tmp_path: Path) -> None:
    cells = [
        make_run(tmp_path / str(seed), ["norm.kind=bn", f"train.seed={seed}"], modes=("population", "batch"))
        for seed in (0, 1)
    ]
    (line,) = read_table(publish(tmp_path, cells).artifacts["table"].read_text())
    measures = [name for mode in ("population", "batch") for name in (f"top-1 % ({mode})", f"95 % ({mode})")]
    assert list(line) == ["norm", "g", "s", "n", *measures, "images/s"]
    for mode in ("population", "batch"):
        values = [100 * cell.top1[mode] for cell in cells]
        assert line[f"top-1 % ({mode})"] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    assert line["images/s"] == "100"


def test_a_norm_that_looks_at_no_group_stands_for_any_size(tmp_path: Path) -> None:
    (line,) = read_table(publish(tmp_path, [make_run(tmp_path / "a", ["norm.kind=gn"])]).artifacts["table"].read_text())
    assert (line["norm"], line["s"]) == ("gn", "any")


def test_a_failed_cell_is_in_the_table_with_its_message(tmp_path: Path) -> None:
    result = publish(tmp_path, [make_run(tmp_path / "a", ["norm.kind=gn"]), failed("bn", 2)])
    text = result.artifacts["table"].read_text()
    assert read_table(text)[1] == {
        "norm": "bn",
        "g": "32",
        "s": "2",
        "n": "0, 1 diverged",
        "top-1 % (population)": "–",
        "95 % (population)": "–",
        "images/s": "–",
    }
    assert "- bn diverged: step 3: the loss is not finite" in text


def test_the_json_is_strict_and_has_null_for_what_is_not_known(tmp_path: Path) -> None:
    result = publish(tmp_path, [make_run(tmp_path / "a", ["norm.kind=gn"]), failed("bn", 2)], ["mind this"])
    text = result.artifacts["json"].read_text()
    value = json.loads(text, parse_constant=lambda name: math.nan / 0)
    assert value["schema"] == "bkn.compare/1"
    assert [(cell["norm"], cell["status"], cell["seconds"]) for cell in value["cells"]] == [
        ("gn", "finished", 2.0),
        ("bn", "diverged", None),
    ]
    assert value["summary"][0]["top1"]["population"]["sd"] is None
    assert value["warnings"] == ["mind this"]


def test_the_picture_has_a_colour_for_every_norm_and_a_band_for_seeds(tmp_path: Path) -> None:
    def colours(name: str, norms: list[str], seeds: int) -> set[tuple[int, ...]]:
        cells = [
            make_run(tmp_path / name / f"{norm}{seed}", [f"norm.kind={norm}", f"train.seed={seed}"])
            for norm in norms
            for seed in range(seeds)
        ]
        with Image.open(publish(tmp_path / name, cells).artifacts["curves"]) as image:
            assert image.format == "PNG"
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        values, counts = np.unique(pixels, axis=0, return_counts=True)
        return {tuple(int(part) for part in value) for value in values[counts > 200]}

    red, green = (214, 39, 40), (44, 160, 44)
    alone = colours("alone", ["gn"], 1)
    assert green in alone and red not in alone
    both = colours("both", ["bn", "gn"], 3)
    assert {red, green} <= both
    assert len(both) > len(alone) + 1  # the bands


def test_a_run_that_diverged_is_drawn_as_far_as_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k))[1])
    good, bad = (make_run(tmp_path / norm, [f"norm.kind={norm}"]) for norm in ("gn", "bn"))
    bad = dataclasses.replace(bad, status="diverged", top1={}, loss={}, message="step 9: the loss is not finite")
    publish(tmp_path, [good, bad, failed("none", 2)])
    (axis,) = drawn[0].axes
    _, line, nothing = axis.get_lines()
    assert (line.get_label(), nothing.get_label()) == ("bn s=2: 1 diverged", "none: 1 diverged")
    top1 = [100 * row["population_top1"] for row in RunFolder(bad.run).records()]
    assert np.allclose(line.get_xydata(), np.c_[[1, 2, 3], top1]) and line.get_marker() == "x"
    assert len(nothing.get_xydata()) == 0
    assert all(float(tick).is_integer() for tick in axis.get_xticks())


def test_the_curves_are_the_mean_over_seeds_between_the_least_and_the_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        drawn.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    cells = [make_run(tmp_path / str(seed), ["norm.kind=gn", f"train.seed={seed}"]) for seed in range(3)]
    publish(tmp_path, cells)
    rows = [[record["population_top1"] for record in RunFolder(cell.run).records()] for cell in cells]
    (axis,) = drawn[0].axes
    (line,), (band,) = axis.get_lines(), axis.collections
    assert line.get_label() == "gn"
    assert np.allclose(line.get_xydata(), np.c_[[1, 2, 3], 100 * np.mean(rows, 0)])
    edges = band.get_paths()[0].vertices
    for epoch in (1, 2, 3):
        heights = edges[edges[:, 0] == epoch, 1]
        top1 = [100 * row[epoch - 1] for row in rows]
        assert np.allclose([heights.min(), heights.max()], [min(top1), max(top1)])


def test_the_picture_draws_what_the_epochs_were_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k))[1])
    cell = make_run(tmp_path / "a", ["norm.kind=gn", "data.validation=0.1"])
    records = tmp_path / "a" / "metrics.jsonl"
    records.write_text(records.read_text().replace('"population_top1', '"validation_population_top1'))
    publish(tmp_path, [cell])
    (axis,) = drawn[0].axes
    top1 = [100 * row["validation_population_top1"] for row in RunFolder(cell.run).records()]
    assert np.allclose(axis.get_lines()[0].get_ydata(), top1)
    assert axis.get_ylabel() == "validation top-1 in %"


def test_an_epoch_that_a_crash_left_recorded_twice_or_not_at_all_does_not_stop_the_picture(tmp_path: Path) -> None:
    cells = [make_run(tmp_path / str(seed), ["norm.kind=gn", f"train.seed={seed}"]) for seed in range(2)]
    lines = (tmp_path / "0" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "0" / "metrics.jsonl").write_text("".join([lines[0], lines[0], lines[2]]))
    assert publish(tmp_path, cells).artifacts["curves"].is_file()


def test_a_comparison_without_any_finished_cell_still_has_all_its_files(tmp_path: Path) -> None:
    result = publish(tmp_path, [failed("bn", 2)])
    assert all(path.stat().st_size > 0 for path in result.artifacts.values())


def test_every_kind_of_norm_has_a_colour() -> None:
    assert set(NORM_COLORS) == set(KINDS)
    colours = [NORM_COLORS[kind] for kind in KINDS if kind != "fixed"]  # another name for "reference"
    assert len(set(colours)) == len(colours)
