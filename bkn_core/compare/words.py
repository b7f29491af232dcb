"""A comparison in words: which row is best, how the others stand to the reference, what did not come to its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from bkn_core.compare.cells import Cell
from bkn_core.compare.columns import show
from bkn_core.compare.rows import Comparison, Row

MODES = {"population": "by population statistics", "batch": "each image by its own statistics"}
Verdict = Literal["ahead", "equal", "behind", "open"]
VERDICTS: dict[Verdict, str] = {
    "ahead": "Better than {}",
    "equal": "As good as {}, up to half a point",
    "behind": "Behind {}",
    "open": "Not told apart from {}",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to know: its kind, a few words that head it, and sentences.

    `kind` is "best", a verdict, "failed" or "mind".
    """

    kind: str
    head: str
    texts: tuple[str, ...]


def findings(rows: Sequence[Row], comparisons: Sequence[Comparison], mode: str) -> list[Finding]:
    """Say how the rows stand by one kind of evaluation statistics."""
    measured = sorted((row for row in rows if mode in row.top1), key=lambda row: -row.top1[mode].mean)
    if not measured:
        return []
    ours = sorted((found for found in comparisons if found.mode == mode), key=lambda found: -found.difference)
    references = list(dict.fromkeys(comparison.reference for comparison in ours))
    texts = [_accuracy(measured[0], mode)]
    texts += [f"the reference {_accuracy(row, mode)}" for row in measured[1:] if row.label in references]
    found = [Finding("best", "Best", tuple(texts))]
    for reference in references:
        for kind, head in VERDICTS.items():
            same = [comparison for comparison in ours if comparison.reference == reference]
            lines = tuple(_against(comparison) for comparison in same if verdict(comparison) == kind)
            found += [Finding(kind, head.format(reference), lines)] if lines else []
    return found


def cautions(rows: Sequence[Row], cells: Sequence[Cell], warnings: Sequence[str]) -> list[Finding]:
    """Say which cells did not come to their end, and what to mind."""
    ended = tuple(f"{cell.run.name} {cell.status}: {cell.message}" for cell in cells if cell.status != "finished")
    minds = list(warnings)
    if rows and max(row.n for row in rows) == 1:
        minds.append(
            "There is one seed of each: the intervals hold the chance of the test images, not of the training."
        )
    found = [Finding("failed", "Did not finish", ended)] if ended else []
    return [*found, *([Finding("mind", "Mind", tuple(minds))] if minds else [])]


def verdict(comparison: Comparison) -> Verdict:
    """Say how a row stands to the reference: as good by the test of equivalence, else by its interval."""
    if comparison.equivalence is not None and comparison.equivalence.equivalent:
        return "equal"
    if comparison.interval is None:
        return "open"
    return "ahead" if comparison.interval[0] > 0 else "behind" if comparison.interval[1] < 0 else "open"


def _accuracy(row: Row, mode: str) -> str:
    seeds = f", mean of {row.n} seeds" if row.n > 1 else ""
    return f"{row.label}: {show('top1', row.top1[mode])} % right{seeds}"


def _against(comparison: Comparison) -> str:
    details = [show("interval", comparison.interval)] if comparison.interval is not None else []
    if verdict(comparison) == "equal" and comparison.equivalence is not None:
        details.append(f"p = {comparison.equivalence.p:.2g}")
    more = f" ({', '.join(details)})" if details else ""
    return f"{comparison.row} {show('difference', comparison.difference)}{more}"
