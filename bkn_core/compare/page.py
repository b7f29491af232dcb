"""The page of a comparison: one HTML file that needs nothing beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from bkn_core.compare.cells import Cell
from bkn_core.compare.charts import draw_differences, draw_sizes, draw_training
from bkn_core.compare.columns import Table, tabulate
from bkn_core.compare.commands import command
from bkn_core.compare.drawing import Picture, draw_key
from bkn_core.compare.layer_charts import Inside, draw_gains, draw_misses, draw_variances
from bkn_core.compare.looks import Look, give_looks, series
from bkn_core.compare.rows import Comparison, Row
from bkn_core.compare.surroundings import surroundings
from bkn_core.compare.words import MODES, Finding, cautions, findings
from bkn_core.engine.insides import look_inside
from bkn_core.engine.run_folder import RunFolder
from bkn_core.errors import BknError
from bkn_core.kinds import GROUPLESS
from bkn_core.recipe import Recipe

_INK = (0.2, 0.2, 0.2)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a page is made of.

    Args:
        title: name of the comparison.
        subtitle: what all runs have in common.
        findings: in words, by kind of evaluation statistics.
        cautions: what did not finish, and what to mind.
        results: a line for each row; `differences` one for each comparison, `runs` one for each cell.
        training_key: how each norm and statistics batch size is drawn there: a picture and its name; so the other keys.
        training: pictures of accuracy against steps and seconds; so the others.
        commands: run and the words that repeat it.
        surroundings: what the runs ran on: name and values.
    """

    title: str
    subtitle: str
    findings: list[tuple[str, list[Finding]]]
    cautions: list[Finding]
    results: Table
    differences: Table | None
    runs: Table
    training_key: list[tuple[str, str]]
    size_key: list[tuple[str, str]]
    layer_key: list[tuple[str, str]]
    training: list[Picture]
    by_size: list[Picture]
    against: list[Picture]
    layers: list[Picture]
    variances: list[Picture]
    commands: list[tuple[str, str]]
    surroundings: list[tuple[str, list[str]]]


def render(contents: Contents) -> str:
    """Return the HTML of a page. All texts are escaped but the pictures, whose letters matplotlib escapes."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("bkn_core.compare", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(page=contents)


def collect(
    title: str,
    rows: Sequence[Row],
    cells: Sequence[Cell],
    comparisons: Sequence[Comparison],
    warnings: Sequence[str],
    insides: Sequence[Inside],
) -> Contents:
    """Put together what a page shows of a comparison; what its runs do not have is left out."""
    modes = [mode for mode in MODES if any(mode in row.top1 for row in rows)]
    recipes = _recipes(cells)
    labels = {label for label, _, found in insides if found.gains}
    drawn = [*zip(rows, give_looks(rows), strict=True)]
    inside = [(row, look) for row, look in drawn if row.label in labels]
    against = [draw_differences(rows, comparisons, mode) for mode in modes]
    return Contents(
        title=title,
        subtitle=_subtitle(cells, [recipe for _, recipe in recipes]),
        findings=[(MODES[mode], findings(rows, comparisons, mode)) for mode in modes],
        cautions=cautions(rows, cells, warnings),
        results=tabulate(rows, without=("label",)),
        differences=tabulate(comparisons, without=("reference", "equivalence_of_margin")) if comparisons else None,
        runs=tabulate(cells),
        training_key=[*_norm_key(drawn, "training"), *_size_key(drawn, "training")],
        size_key=_norm_key(drawn, "by-size"),
        layer_key=[*_norm_key(inside, "layers"), *_size_key(inside, "layers")],
        training=_some(
            draw_training(rows, cells, mode, over) for mode in modes or MODES for over in ("step", "seconds")
        ),
        by_size=_some(draw_sizes(rows, mode) for mode in modes),
        against=_some(against),
        layers=_some((draw_gains(insides), draw_misses(insides))),
        variances=draw_variances(insides),
        commands=[(cell.run.name, command(recipe, cell.run)) for cell, recipe in recipes],
        surroundings=surroundings([cell.run for cell in cells]),
    )


def see_insides(rows: Sequence[Row], cells: Sequence[Cell], *, measure: bool, trusted: bool) -> list[Inside]:
    """Look into the first finished run of each Kalman row, and of each other norm's row of the smallest groups."""
    insides = []
    for row, look in zip(rows, give_looks(rows), strict=True):
        smallest = min((r for r in rows if r.n and series(r) == series(row)), key=lambda r: r.statistics, default=row)
        run = next((cell.run for cell in cells if row.holds(cell) and cell.status == "finished"), None)
        if run is None or not (row.norm == "bkn" or row is smallest):
            continue
        inside = look_inside(run, measure=measure, trusted=trusted)
        if inside is None:
            continue
        if row is not smallest:
            inside = inside.model_copy(update={"variances": None})
        insides.append((row.label, look, inside))
    return insides


def _recipes(cells: Sequence[Cell]) -> list[tuple[Cell, Recipe]]:
    known = []
    for cell in cells:
        try:
            known.append((cell, RunFolder.open(cell.run).recipe))
        except BknError:  # it ended before it had a folder
            continue
    return known


def _subtitle(cells: Sequence[Cell], recipes: Sequence[Recipe]) -> str:
    finished = sum(cell.status == "finished" for cell in cells)
    parts = [_count(len(cells), "run") if finished == len(cells) else f"{finished} of {len(cells)} runs finished"]
    described = [
        (
            recipe.data.name,
            recipe.model.name,
            _count(recipe.train.epochs, "epoch"),
            f"{_count(recipe.batch.gradient, 'image')} a step",
        )
        for recipe in recipes
    ]
    for values in zip(*described, strict=True):
        parts.append(", ".join(dict.fromkeys(values)))
    return " · ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _norm_key(drawn: Sequence[tuple[Row, Look]], place: str) -> list[tuple[str, str]]:
    looks: dict[str, Look] = {}
    for row, look in drawn:
        looks.setdefault(series(row), dataclasses.replace(look, line="-"))
    return [(draw_key(look, f"{place}-norm-{i}"), name) for i, (name, look) in enumerate(looks.items())]


def _size_key(drawn: Sequence[tuple[Row, Look]], place: str) -> list[tuple[str, str]]:
    lines = {row.statistics: Look(_INK, "", look.line) for row, look in drawn if row.norm not in GROUPLESS}
    several = sorted(lines.items()) if len(lines) > 1 else ()
    return [(draw_key(look, f"{place}-size-{size}"), f"s = {size}") for size, look in several]


def _some(pictures: Iterable[Picture | None]) -> list[Picture]:
    return [picture for picture in pictures if picture is not None]
