"""The fields of cells, rows and comparisons as columns: of a table for people, and of a CSV file for programs."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bkn_core.compare.cells import Cell
from bkn_core.compare.rows import Spread

_TITLES = {
    "gradient": "g",
    "statistics": "s",
    "n": "runs",
    "difference": "difference in points",
    "interval": "95 % interval",
    "p_values": "McNemar p",
    "t_p": "t test p",
    "images_per_second": "images/s",
    "relative_images_per_second": "images/s ÷ reference",
    "relative_peak_memory": "memory ÷ reference",
    "peak_memory": "memory in MiB",
}
_SHARES = {"top1", "validation", "difference", "interval", "target", "margin"}  # in %, or points


@dataclasses.dataclass(frozen=True)
class Field:
    """One cell of a table: what is read, and what it is sorted by."""

    text: str
    value: float | str


@dataclasses.dataclass(frozen=True)
class Table:
    """A header, whether numbers stand under it, and lines as long as it."""

    header: list[str]
    numeric: list[bool]
    lines: list[list[Field]]


def tabulate(items: Sequence[Any], *, without: Sequence[str] = ()) -> Table:
    """Return the fields of dataclasses as a table, without columns in which nothing stands."""
    flat = [flatten(item) for item in items]
    names = list(dict.fromkeys(name for fields in flat for name in fields if name not in without))
    names = [name for name in names if any(not _is_nothing(fields.get(name)) for fields in flat)]
    lines = [[Field(show(name, fields.get(name)), _sorted_by(fields.get(name))) for name in names] for fields in flat]
    numeric = [any(isinstance(line[i].value, float) for line in lines) for i in range(len(names))]
    return Table([title(name) for name in names], numeric, lines)


def cells_as_csv(cells: Sequence[Cell]) -> str:
    """Return one line for each cell, numbers as they are; what is not known is empty."""
    flat = [flatten(cell) for cell in cells]
    columns = list(dict.fromkeys(name for fields in flat for name in fields))
    text = io.StringIO()
    writer = csv.DictWriter(text, [column.replace("_of_", "_") for column in columns], lineterminator="\n")
    writer.writeheader()
    for fields in flat:
        known = {name: value for name, value in fields.items() if not _is_nothing(value)}
        writer.writerow({name.replace("_of_", "_"): value for name, value in known.items()})
    return text.getvalue()


def flatten(item: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name; `top1` of "batch" is `top1_of_batch`, and so with dataclasses in it."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Spread):
            flat |= {f"{field.name}_of_{name}": part for name, part in flatten(value).items()}
        elif isinstance(value, dict) and field.name in ("top1", "loss", "validation", "validation_loss"):
            flat |= {f"{field.name}_of_{name}": part for name, part in value.items()}
        else:
            flat[field.name] = value
    return flat


def title(name: str) -> str:
    """Return the words over a column."""
    field, _, of = name.partition("_of_")
    if field in ("top1", "validation"):
        return f"{'top-1' if field == 'top1' else field} in % ({of})"
    words = _TITLES.get(field, field.replace("_", " "))
    return f"{words} ({of})" if of in ("population", "batch") else f"{words}: {of.replace('_', ' ')}" if of else words


def show(name: str, value: Any) -> str:
    """Return a value as people read it."""
    if _is_nothing(value):
        return "–"
    field, _, of = name.partition("_of_")
    factor = 100.0 if field in _SHARES or of in _SHARES else 2.0**-20 if field == "peak_memory" else 1.0
    if isinstance(value, Spread):
        mean = f"{factor * value.mean:.2f}"
        return mean if math.isnan(value.sd) else f"{mean} ± {factor * value.sd:.2f}"
    if field == "interval":
        return " to ".join(f"{factor * end:+z.2f}" for end in value)
    if isinstance(value, dict):
        p_values = field == "p_values"
        return ", ".join(f"{part:.2g}" if p_values else f"{part} {key}" for key, part in value.items())
    if isinstance(value, (tuple, list)):
        return ", ".join(_listed(part) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _number(field, of, factor * value)
    return value.name if isinstance(value, Path) else f"{value:,}" if isinstance(value, int) else str(value)


def _number(field: str, of: str, value: float) -> str:
    if field == "difference":
        return f"{value:+z.2f}"
    if field in _SHARES and (of in ("", "population", "batch") or of in _SHARES):
        return f"{value:.2f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:z.3g}"


def _listed(part: Any) -> str:
    """Return a member of a list; of a dataclass the first two fields, such as a learning rate and what it gave."""
    if dataclasses.is_dataclass(part):
        return ": ".join(show(name, value) for name, value in list(flatten(part).items())[:2])
    return str(part)


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or value in ("", {}, (), [])


def _sorted_by(value: Any) -> float | str:
    """Return a number or text to sort a column by; what is not known comes first."""
    if _is_nothing(value):
        return ""
    value = value.mean if isinstance(value, Spread) else value[0] if isinstance(value, tuple) and value else value
    value = next(iter(value.values())) if isinstance(value, dict) else value
    return float(value) if isinstance(value, (int, float)) else str(value)
