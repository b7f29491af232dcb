"""How a row of a comparison looks in every picture: its norm's colour and marker, a line for its statistics groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bkn_core.compare.rows import Row
from bkn_core.engine.plots import NORM_COLORS, NORM_MARKERS
from bkn_core.kinds import GROUPLESS

_Line = str | tuple[int, tuple[int, ...]]
LINES: tuple[_Line, ...] = ("-", "--", ":", "-.", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 4)), (0, (12, 3, 3, 3)))


@dataclasses.dataclass(frozen=True)
class Look:
    """Colour, marker and line of a row.

    Args:
        color: of the norm, paler for each further variant of it.
        marker: of the norm.
        line: of the statistics batch size.
    """

    color: tuple[float, ...]
    marker: str
    line: _Line

    def style(self, **more: Any) -> dict[str, Any]:
        """Return what matplotlib draws a line by."""
        return {"color": self.color, "marker": self.marker, "linestyle": self.line, "markersize": 5, **more}


def series(row: Row) -> str:
    """Name a row without its statistics batch size: what one line over these sizes stands for."""
    return row.label.replace(f" s={row.statistics}", "", 1)


def give_looks(rows: Sequence[Row]) -> list[Look]:
    """Return the look of each row."""
    sizes = sorted({row.statistics for row in rows if row.norm not in GROUPLESS})
    looks = []
    for row in rows:
        variants = list(dict.fromkeys(series(other) for other in rows if other.norm == row.norm))
        share = variants.index(series(row)) / (len(variants) + 1)
        number = sizes.index(row.statistics) if row.norm not in GROUPLESS else 0
        line = LINES[number % len(LINES)]
        looks.append(Look(_paler(NORM_COLORS[row.norm], share), NORM_MARKERS[row.norm], line))
    return looks


def _paler(color: str, share: float) -> tuple[float, ...]:
    """Mix a colour with a share of white."""
    from matplotlib.colors import to_rgb

    return tuple(part + share * (1 - part) for part in to_rgb(color))
