"""The report of a comparison as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from bkn_core.compare.cells import Cell
from bkn_core.compare.rows import Comparison, Rate, Row, Spread
from bkn_core.kinds import GROUPLESS

_NONE = "–"
_TESTS = (
    "Differences are in percentage points. Their interval is a paired bootstrap over the test images with the models "
    "as they are; t is a paired t test over the seeds; TOST tests that the difference is within half a point, over the "
    "seeds, with a single one over its test images.\n"
)


def table(
    rows: Sequence[Row], comparisons: Sequence[Comparison], cells: Sequence[Cell], warnings: Sequence[str]
) -> str:
    """Return the report: the summary, differences, costs, the choice of rates, what failed and what to mind."""
    parts = [_summary(rows), *_differences(comparisons), *_costs(rows, cells), *_rates(rows)]
    failed = [f"- {cell.run.name} {cell.status}: {cell.message}\n" for cell in cells if cell.message]
    warned = [f"- {warning}\n" for warning in warnings]
    return "\n".join([*parts, *("".join(lines) for lines in (failed, warned) if lines)])


def _summary(rows: Sequence[Row]) -> str:
    modes = [mode for mode in ("population", "batch") if any(mode in row.top1 for row in rows)]
    named = [name for name in ("recipe", "model") if any(getattr(row, name) for row in rows)]
    tried = any(row.rates for row in rows)
    measures = [part for mode in modes for part in (f"top-1 % ({mode})", f"95 % ({mode})")]
    lines = []
    for row in rows:
        norm = f"{row.norm} ({row.variant})" if row.variant else row.norm
        size = "any" if row.norm in GROUPLESS else str(row.statistics)
        accuracies = [part for mode in modes for part in _accuracy(row.top1.get(mode))]
        place = [*(getattr(row, name) for name in named), norm, str(row.gradient), size]
        rate = [_chosen_rate(row)] if tried else []
        lines.append([*place, *rate, row.finished, *accuracies, _number(row.images_per_second, ".0f")])
    header = [*named, "norm", "g", "s", *(["lr"] if tried else []), "n", *measures, "images/s"]
    return _markdown(header, lines) + (
        "\nThe 95 % intervals are of the mean, a bootstrap over seeds and test images.\n"
        if any(spread.interval for row in rows for spread in row.top1.values())
        else ""
    )


def _chosen_rate(row: Row) -> str:
    return _number(row.learning_rate, "g") + (f" ({row.edge} tried)" if row.edge else "")


def _accuracy(spread: Spread | None) -> tuple[str, str]:
    """Return mean with deviation, and the interval."""
    if spread is None:
        return _NONE, _NONE
    deviation = "" if math.isnan(spread.sd) else f" ± {100 * spread.sd:.2f}"
    interval = _NONE if spread.interval is None else " to ".join(f"{100 * end:.2f}" for end in spread.interval)
    return f"{100 * spread.mean:.2f}{deviation}", interval


def _differences(comparisons: Sequence[Comparison]) -> Iterator[str]:
    for reference in dict.fromkeys(comparison.reference for comparison in comparisons):
        header = [f"against {reference}", "statistics", "seeds", "difference", "95 % interval", "McNemar p", "t p"]
        lines = [_comparison_line(one) for one in comparisons if one.reference == reference]
        yield _markdown([*header, "TOST p", "within 0.5"], lines)
    if comparisons:
        yield _TESTS


def _comparison_line(comparison: Comparison) -> list[str]:
    interval = _NONE
    if comparison.interval is not None:
        interval = " to ".join(f"{100 * end:+z.2f}" for end in comparison.interval)
    tost = comparison.equivalence
    return [
        comparison.row,
        comparison.mode,
        ", ".join(map(str, comparison.seeds)),
        f"{100 * comparison.difference:+z.2f}",
        interval,
        ", ".join(f"{value:.2g}" for value in comparison.p_values.values()) or _NONE,
        _number(comparison.t_p, ".2g"),
        _NONE if tost is None else f"{tost.p:.2g} ({tost.over})",
        _NONE if tost is None else "yes" if tost.equivalent else "not shown",
    ]


def _costs(rows: Sequence[Row], cells: Sequence[Cell]) -> Iterator[str]:
    header = ["row", "parameters", "images/s ×", "memory MiB", "memory ×", "steps to target", "seconds to target"]
    lines = []
    for row in rows:
        memory = None if row.peak_memory is None else row.peak_memory / 2**20
        reached = "" if row.reached == row.n else f" ({row.reached} of {row.n})"
        numbers = [
            _number(row.parameters, ",d"),
            _number(row.relative_images_per_second, ".2f"),
            _number(memory, ".0f"),
            _number(row.relative_peak_memory, ".2f"),
            _number(row.steps_to_target, ".0f") + (reached if row.n else ""),
            _number(row.seconds_to_target, ".1f"),
        ]
        lines.append([row.label, *numbers])
    goals = sorted({cell.target for cell in cells if cell.target is not None})
    if goals:
        yield _markdown(header, lines)
        yield (
            f"× is over the reference of the same seed. The target is {' to '.join(_percent(goals))} % top-1 after an "
            "epoch, on the images that epochs are measured on.\n"
        )


def _percent(goals: Sequence[float]) -> list[str]:
    return list(dict.fromkeys(f"{100 * goal:.2f}" for goal in (goals[0], goals[-1])))


def _rates(rows: Sequence[Row]) -> Iterator[str]:
    lines = [_rate_line(row, rate) for row in rows for rate in row.rates]
    if lines:
        yield _markdown(["row", "lr", "validation top-1 %", "n", ""], lines)


def _rate_line(row: Row, rate: Rate) -> list[str]:
    ends = ", ".join([str(rate.n), *(f"{count} {status}" for status, count in rate.unfinished.items())])
    is_chosen = rate.learning_rate == row.learning_rate
    note = "chosen" + (f"; the {row.edge} tried: a better one may lie beyond" if row.edge else "")
    return [
        row.label,
        f"{rate.learning_rate:g}",
        f"{100 * rate.validation:.2f}",
        ends,
        note if is_chosen else "",
    ]


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None or math.isnan(value) else format(value, form)


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up as plain text too."""
    cells = [[text.replace("|", "\\|") for text in line] for line in (header, *lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in cells]
    rows = [padded[0], ["-" * width for width in widths], *padded[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
