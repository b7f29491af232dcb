"""The report of robustness.py: a table for each image set, then every place that speaks against the method."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from robustness_data import NAMES, is_segmentation
from robustness_grid import NORMS, Settings

BEHIND = 1.0  # points that ours may be behind the reference
APART = 0.5  # points that the figures by population and by each image may differ
REFERENCES = {"bn": "BN with s = g", "gn": "GN", "in": "IN"}

Record = dict[str, Any]
Row = tuple[Any, ...]


def row(settings: Settings) -> Row:
    """Everything of a training but its norm, group, rate and seed."""
    seen = f"{settings.images} images" + (", test" if settings.part == "test" else "")
    network = settings.network + (", centred weights" if settings.weights == "centred" else "")
    return settings.data, seen, network, settings.optimizer, settings.g


def report(records: Iterable[Record]) -> str:
    """Write the tables and lists in Markdown.

    Args:
        records: what the trainings returned, with their `settings`; another seed is another record.
    """
    places: dict[Row, dict[Row, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        one = Settings(**record["settings"])
        places[row(one)][one.s, one.norm, one.factor].append(record)
    lines = []
    for name in NAMES:
        rows = {key: cells for key, cells in places.items() if key[0] == name}
        if rows:
            lines += _table(name, rows)
    return "\n".join([*lines, *_lists(places)]).rstrip()


def _table(name: str, rows: dict[Row, dict[Row, list[Record]]]) -> list[str]:
    """Lay out one image set: a row for each setting and norm, a column for each factor of the learning rate."""
    factors = sorted({factor for cells in rows.values() for _, _, factor in cells})
    figure = "mean IoU" if is_segmentation(name) else "accuracy"
    lines = [f"## {name}", "", f"{figure} in %, by population statistics; of BKN also by each image by itself", ""]
    lines.append("| network | optimizer | seen | g | s | norm |" + "".join(f" lr × {f:g} |" for f in factors))
    lines.append("|---" * (6 + len(factors)) + "|")
    for (_, seen, network, optimizer, g), cells in sorted(rows.items(), key=lambda item: _order(item[0])):
        for s, norm in sorted({key[:2] for key in cells}, key=lambda key: (NORMS.index(key[1]), -key[0])):
            figures = "".join(f" {_cell(cells.get((s, norm, factor), []))} |" for factor in factors)
            group = "" if norm in ("gn", "in") else s
            lines.append(f"| {network} | {optimizer} | {seen} | {g} | {group} | {norm.upper()} |{figures}")
    return [*lines, ""]


def _order(key: Row) -> Row:
    return (*key[:-1], -key[-1])


def _cell(records: list[Record]) -> str:
    """Write the means over seeds, and how many trainings diverged or could not run."""
    figures = [_mean(records, name) for name in ("population", "single")]
    words = [" / ".join(f"{figure:.1f}" for figure in figures if figure is not None)]
    for kind in ("diverged", "error"):
        count = sum(bool(record.get(kind)) for record in records)
        words += [f"{kind} {count} of {len(records)}" if len(records) > 1 else kind] if count else []
    return ", ".join(word for word in words if word)


def _mean(records: list[Record], name: str) -> float | None:
    values = [record[name] for record in records if record.get(name) is not None]
    return fmean(values) if values else None


def _lists(places: dict[Row, dict[Row, list[Record]]]) -> list[str]:
    """List what speaks against the method, the worst first, and what failed."""
    behind: dict[str, list[tuple[float, str]]] = {norm: [] for norm in REFERENCES}
    compared, apart, ours = dict.fromkeys(REFERENCES, 0), [], 0
    for key, cells in places.items():
        for (s, norm, factor), records in cells.items():
            if norm != "bkn":
                continue
            words, ours = _words(key, s, factor), ours + 1
            for other in REFERENCES:
                gap = _gap(cells.get((key[-1], other, factor), []), records)
                compared[other] += gap is not None
                if gap is not None and gap[0] > BEHIND:
                    behind[other].append((gap[0], f"{words}: {gap[1]}"))
            population, single = _mean(records, "population"), _mean(records, "single")
            if population is not None and single is not None and abs(single - population) > APART:
                difference = f"{population:.1f} by population, {single:.1f} by each image ({single - population:+.1f})"
                apart.append((abs(single - population), f"{words}: {difference}"))
    lines = ["## What speaks against the method", ""]
    for norm, found in ((norm, found) for norm, found in behind.items() if compared[norm] or norm == "bn"):
        lines += _list(f"BKN more than {BEHIND:g} point behind {REFERENCES[norm]}", found, compared[norm])
    lines += _list(f"population and single images more than {APART:g} apart", apart, ours)
    return [*lines, *_failures(places)]


def _gap(theirs: list[Record], ours: list[Record]) -> tuple[float, str] | None:
    """Return how far ours is behind over the seeds that both have, and say it; infinitely where only ours failed."""
    seeds = {record["settings"]["seed"]: record.get("population") for record in ours}
    pairs = [(record["population"], seeds.get(record["settings"]["seed"], math.nan)) for record in theirs]
    pairs = [(their, our) for their, our in pairs if their is not None and our == our]
    if not pairs:
        return None
    if any(our is None for _, our in pairs):
        return math.inf, f"no figure, against {fmean(their for their, _ in pairs):.1f}"
    differences = [their - our for their, our in pairs]
    gap, error = fmean(differences), ""
    if len(pairs) > 1:
        deviation = math.sqrt(sum((d - gap) ** 2 for d in differences) / (len(pairs) - 1) / len(pairs))
        error = f" ± {deviation:.1f}"
    means = [fmean(values) for values in zip(*pairs, strict=True)]
    return gap, f"{means[1]:.1f} against {means[0]:.1f} (-{gap:.1f}{error}; seeds: {len(pairs)})"


def _words(key: Row, s: int, factor: float) -> str:
    data, seen, network, optimizer, g = key
    return f"{data}, {network}, {optimizer} × {factor:g}, g = {g}, s = {s}, {seen}"


def _list(title: str, found: list[tuple[float, str]], compared: int) -> list[str]:
    items = [f"- {words}" for _, words in sorted(found, reverse=True)] or ["- none"]
    return [f"**{title}: {len(found)} of {compared} places**", "", *items, ""]


def _failures(places: dict[Row, dict[Row, list[Record]]]) -> list[str]:
    """List every divergence and every training that stopped with an error, of all norms."""
    found, total = [], 0
    for key, cells in places.items():
        for (s, norm, factor), records in cells.items():
            total += len(records)
            for record in records:
                what = f"{record['error']}" if record.get("error") else "diverged" if record["diverged"] else ""
                if what:
                    seed = record["settings"]["seed"]
                    found.append((norm == "bkn", f"{norm.upper()}: {_words(key, s, factor)}, seed {seed}: {what}"))
    items = [f"- {words}" for _, words in sorted(found, key=lambda item: not item[0])] or ["- none"]
    return [f"**divergences and errors: {len(found)} of {total} trainings**", "", *items, ""]
