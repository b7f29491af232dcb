"""From a matplotlib figure to an SVG picture that stands in a page by itself, with words for those who cannot see."""

from __future__ import annotations

import dataclasses
import io
import re
from typing import Any

from bkn_core.compare.looks import Look
from bkn_core.engine.plots import new_figure

_WIDTH, _HEIGHT = 5.2, 3.4  # inches: letters of 10 points are readable on a screen and on a phone
_RULES: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters stay letters: small, found by a search, read aloud
    "svg.hashsalt": "bkn",
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """An SVG element, its heading and what it shows in words."""

    name: str
    title: str
    words: str
    svg: str


def new_axis(*, width: float = _WIDTH, height: float = _HEIGHT) -> tuple[Any, Any]:
    """Return a figure with one axis, framed on the left and below."""
    figure = new_figure(figsize=(width, height), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    return figure, axis


def to_picture(figure: Any, name: str, title: str, words: str) -> Picture:
    """Return a figure as an SVG element; the name makes its identifiers its own among those of a page."""
    return Picture(name, title, words, _svg(figure, name))


def draw_key(look: Look, name: str) -> str:
    """Return the line and marker of a look as a small SVG element."""
    figure = new_figure(figsize=(0.55, 0.2))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.plot([0, 0.5, 1], [0, 0, 0], **look.style(markevery=[1], linewidth=1.6))
    axis.set(xlim=(0, 1), ylim=(-1, 1))
    axis.set_axis_off()
    return _svg(figure, name)


def _svg(figure: Any, name: str) -> str:
    import matplotlib

    text = io.StringIO()
    figure.patch.set_visible(False)
    with matplotlib.rc_context(_RULES):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))

    def named(found: re.Match[str]) -> str:
        is_first = found[1] in used
        used.discard(found[1])  # what has the same name has the same content
        return f' id="{name}-{found[1]}"' if is_first else ""

    svg = re.sub(r' id="([^"]+)"', named, svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    return re.sub(r"\n\s*", "\n", svg)
