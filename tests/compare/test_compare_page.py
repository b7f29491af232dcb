"""What the page of a comparison says, and that it needs nothing beside it."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_runs import make_run

from bkn_core.compare.cells import Cell
from bkn_core.compare.charts import draw_training
from bkn_core.compare.columns import tabulate
from bkn_core.compare.commands import command
from bkn_core.compare.report import publish, with_page
from bkn_core.compare.rows import Comparison, Equivalence, Row, Spread
from bkn_core.compare.summary import summarize
from bkn_core.compare.surroundings import surroundings
from bkn_core.compare.words import cautions, findings, verdict
from bkn_core.engine.insides import Gains, Insides, PriorMiss, Variances
from bkn_core.engine.plots import plot_curves
from bkn_core.engine.run_folder import RunFolder
from bkn_core.recipe import load_recipe

EVIL = "<img src=x onerror=alert(1)> & $^$ \"'"


class Reader(HTMLParser):
    """Tags with their attributes, and the text outside of pictures, scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.silent = "", 0
        self.sections = re.findall("<h2>(.*?)</h2>", page)
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.silent += tag in ("svg", "script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.silent -= tag in ("svg", "script", "style")

    def handle_data(self, data: str) -> None:
        self.text += "" if self.silent else data


def page_of(out: Path, cells: list[Cell]) -> str:
    result = with_page(publish(out, cells), measure=False, trusted=False)
    return result.artifacts["page"].read_text()


def row(label: str, top1: float, *, n: int = 1) -> Row:
    return Row("bn", 32, 2, "", n, {"population": Spread(top1, 0.001)}, 100.0, label=label)


def against(row: str, difference: float, interval: tuple[float, float] | None, p: float = 0.9) -> Comparison:
    equal = Equivalence(0.005, p, "images", p < 0.05)
    return Comparison(row, "bn s=32", "population", (0,), difference, interval, {0: 0.5}, None, equal)


def test_the_words_say_who_is_best_and_how_each_stands_to_the_reference() -> None:
    rows = [row("bn s=32", 0.95), row("a", 0.97), row("b", 0.951), row("c", 0.90), row("d", 0.94)]
    comparisons = [
        against("a", 0.02, (0.01, 0.03)),
        against("b", 0.001, (-0.002, 0.004), p=0.01),
        against("c", -0.05, (-0.07, -0.03)),
        against("d", -0.01, (-0.03, 0.01)),
    ]
    said = {
        finding.kind: " ".join([finding.head, *finding.texts]) for finding in findings(rows, comparisons, "population")
    }
    assert said["best"] == "Best a: 97.00 ± 0.10 % right the reference bn s=32: 95.00 ± 0.10 % right"
    assert said["ahead"] == "Better than bn s=32 a +2.00 (+1.00 to +3.00)"
    assert said["equal"] == "As good as bn s=32, up to half a point b +0.10 (-0.20 to +0.40, p = 0.01)"
    assert said["behind"].startswith("Behind bn s=32 c -5.00")
    assert said["open"].startswith("Not told apart from bn s=32 d -1.00")
    assert findings(rows, comparisons, "batch") == []


@pytest.mark.parametrize(
    ("interval", "p", "expected"),
    [(None, 0.9, "open"), (None, 0.01, "equal"), ((0.001, 0.004), 0.01, "equal"), ((0.001, 0.02), 0.2, "ahead")],
)
def test_equivalence_comes_before_a_difference_that_is_too_small_to_matter(
    interval: tuple[float, float] | None, p: float, expected: str
) -> None:
    assert verdict(against("a", 0.002, interval, p)) == expected


def test_runs_that_did_not_finish_and_single_seeds_are_said() -> None:
    bad = Cell("bn", 32, 1, 0, "diverged", Path("cells/bn-s1"), message="step 3: the loss is not finite")
    failed, mind = cautions([row("a", 0.9)], [bad], ["the runs differ in optim.lr"])
    assert failed.texts == ("bn-s1 diverged: step 3: the loss is not finite",)
    assert mind.texts[0] == "the runs differ in optim.lr" and "one seed" in mind.texts[1]
    assert cautions([row("a", 0.9, n=3)], [], []) == []


def test_a_table_has_the_columns_that_hold_something() -> None:
    table = tabulate([row("a", 0.9), dataclasses.replace(row("b", 0.8), learning_rate=0.1, peak_memory=2.0**21)])
    assert "edge" not in table.header and "recipe" not in table.header
    at = {name: [line[i] for line in table.lines] for i, name in enumerate(table.header)}
    assert [field.text for field in at["top-1 in % (population)"]] == ["90.00 ± 0.10", "80.00 ± 0.10"]
    assert [field.value for field in at["learning rate"]] == ["", 0.1]
    assert [field.text for field in at["memory in MiB"]] == ["–", "2"]


def test_what_others_have_named_is_text_and_nothing_else(tmp_path: Path) -> None:
    good, bad = make_run(tmp_path / EVIL, ["norm.kind=gn"]), make_run(tmp_path / "b", ["norm.kind=bn"])
    (good.run / "env.json").write_text(json.dumps({"device": EVIL, EVIL: {"data": [EVIL]}}))
    good = dataclasses.replace(good, variant=EVIL)
    bad = dataclasses.replace(bad, status="failed", top1={}, message=EVIL)
    page = Reader(page_of(tmp_path / "<b>out", [good, bad]))
    assert not [tag for tag, _ in page.tags if tag in ("img", "b", "link", "iframe", "object")]
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(EVIL) >= 4 and "<b>out" in page.text


def test_the_page_is_one_file_of_unique_names_that_looks_up_nothing(tmp_path: Path) -> None:
    cells = [
        make_run(
            tmp_path / f"{norm}{size}", [f"norm.kind={norm}", f"batch.statistics={size}"], modes=("population", "batch")
        )
        for norm in ("bn", "gn")
        for size in ((2, 32) if norm == "bn" else (2,))
    ]
    text = page_of(tmp_path, cells)
    page = Reader(text)
    named = [value for _, attributes in page.tags for name, value in attributes.items() if name == "id"]
    assert len(set(named)) == len(named) > 0
    leading = [
        v or "" for _, attributes in page.tags for n, v in attributes.items() if n in ("src", "href", "xlink:href")
    ]
    assert all(value.startswith(("#", "data:")) for value in leading)
    assert "url(http" not in text and "@import" not in text
    assert all(attributes.get("aria-label") for _, attributes in page.tags if attributes.get("role") == "img")
    assert len(text) < 1_500_000
    assert page.sections[:5] == [
        "In short",
        "Results",
        "While training",
        "By the size of statistics groups",
        "Against the reference",
    ]


def test_what_runs_do_not_have_is_left_out(tmp_path: Path) -> None:
    page = Reader(page_of(tmp_path, [make_run(tmp_path / "a", ["norm.kind=gn"], epochs=0)]))
    assert page.sections == ["In short", "Results", "Runs", "To repeat a run"]
    assert "bkn train digits_micro norm.kind=gn" in page.text
    gone = Cell("bn", 32, 1, 0, "diverged", tmp_path / "gone", message="step 3")
    assert Reader(page_of(tmp_path, [gone])).sections == ["In short", "Results", "Runs"]


def test_what_a_run_shows_inside_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = Insides(
        digest="",
        images=8,
        gains=[Gains(name="bn1", used=0.0, implied=(0.25, 0.5)), Gains(name="bn2", used=0.1, implied=None)],
        priors=[PriorMiss(name="bn2", prior="relu(bn1) -> bn2", refined=(0.1, 0.0, 0.1), analytic=(0.1, None, 0.1))],
        variances=Variances(layer="bn2", statistics=2, moving=[1, 10], observed=[[10, 1]] * 4, used=[[1, 10]] * 4),
    )
    module = importlib.import_module("bkn_core.compare.page")  # `bkn_core.compare` is the function too
    monkeypatch.setattr(module, "look_inside", lambda run, **options: inside)
    page = Reader(page_of(tmp_path, [make_run(tmp_path / "a", ["norm.kind=bkn"])]))
    assert page.sections[-4:-2] == ["Inside the layers", "Variance of small groups"]
    words = [attributes.get("aria-label") or "" for _, attributes in page.tags]
    assert "The gain of each layer. Means over layers: bkn s=2 0.300." in words
    gaps = [re.search(r"factor of ([\d.]+)", text) for text in words if "moving variance by" in text]
    assert [gap and gap[1] for gap in gaps] == ["10.00", "1.00"]


def test_a_command_repeats_a_run(tmp_path: Path) -> None:
    for words in (["norm.kind=gn", "data.root=a b/é"], ["norm.gain=0.02", "train.class_weights=[1,2]"], []):
        recipe = load_recipe(None, words)
        program, verb, name, *given = shlex.split(command(recipe, tmp_path))
        assert (program, verb, load_recipe(name, given)) == ("bkn", "train", recipe)
    named = load_recipe(None, []).model_copy(update={"name": "mine"})
    assert command(named, Path("runs/a b")) == "bkn train 'runs/a b/config.yaml'"


def test_surroundings_that_all_share_are_said_once(tmp_path: Path) -> None:
    for name, threads in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "env.json").write_text(json.dumps({"versions": {"torch": "2.11"}, "threads": threads}))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "env.json").write_text("[")
    found = surroundings([tmp_path / name for name in ("a", "b", "c", "gone")])
    assert found == [("versions torch", ["2.11"]), ("threads", ["1 (a)", "2 (b)"])]


def test_the_csv_has_a_line_for_every_cell_and_nothing_where_nothing_is_known(tmp_path: Path) -> None:
    bad = Cell("bn", 32, 2, 0, "diverged", tmp_path / "bad", message="a, b")
    result = publish(tmp_path, [make_run(tmp_path / "a", ["norm.kind=gn"]), bad])
    good, lost = csv.DictReader(result.artifacts["csv"].read_text().splitlines())
    assert (good["norm"], float(good["top1_population"])) == ("gn", result.cells[0].top1["population"])
    assert (lost["status"], lost["message"], lost["top1_population"], lost["seconds"]) == ("diverged", "a, b", "", "")


def test_a_dollar_sign_in_a_name_is_no_formula(tmp_path: Path) -> None:
    cell = make_run(tmp_path / "a$^$b", ["norm.kind=gn"])
    RunFolder(cell.run).record({"kind": "step", "step": 1, "epoch": 1, "loss": 1.0})
    plot_curves(RunFolder(cell.run))
    assert publish(tmp_path, [dataclasses.replace(cell, variant="data.root=a$^$b")]).artifacts["curves"].is_file()


def test_one_of_a_kind_is_said_in_the_singular(tmp_path: Path) -> None:
    words = ["norm.kind=gn", "train.epochs=1", "batch.gradient=1", "batch.statistics=1"]
    page = page_of(tmp_path / "out", [make_run(tmp_path / "a", words, epochs=1)])
    assert "1 run · digits · cifar_resnet8 · 1 epoch · 1 image a step" in Reader(page).text


def test_steps_are_counted_in_whole_ones(tmp_path: Path) -> None:
    cells = [make_run(tmp_path / "run", ["norm.kind=bn"], epochs=2)]
    picture = draw_training(summarize(cells), cells, "population", "step")
    assert picture is not None
    assert {"0", "1", "2"} <= set(re.findall(r">([\d.]+)</text>", picture.svg))
