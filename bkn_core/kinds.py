"""The kinds of normalization, as recipes and conversions name them."""

from __future__ import annotations

from typing import Literal, get_args

from bkn_core.errors import RecipeError

Own = Literal["bkn", "bn", "brn", "gn", "ln", "in", "fixed", "none"]
Rivals = Literal[
    "gn_ws",
    "mabn",
    "online",
    "frn",
    "evonorm",
    "frozen",
    "reference",
    "iternorm",
    "gkn",
    "normprop",
    "cbn",
]
Kind = Literal[Own, Rivals]
KINDS: tuple[Kind, ...] = get_args(Kind)

GROUPLESS: frozenset[Kind] = frozenset(
    {"gn", "ln", "in", "fixed", "none", "gn_ws", "online", "frn", "evonorm", "frozen", "reference", "gkn", "normprop"}
)
"""Those that do not look at statistics groups: one run stands for every statistics batch size."""

POPULATION_ONLY: frozenset[Kind] = frozenset(
    {"brn", "fixed", "mabn", "online", "frozen", "reference", "iternorm", "normprop", "cbn"}
)
"""Those whose layers cannot normalize an image by its own statistics when they are measured."""


def check_statistics(kind: Kind, stats: str | None, *, asked: str) -> None:
    """Refuse to measure or export by each image's own statistics what has none.

    Args:
        kind: of normalization.
        stats: what was asked for, such as "population", "both", "mixtures" or "auto".
        asked: where, such as `eval.stats`.

    Raises:
        RecipeError: it was "batch" or "both", and layers of this kind know the population's alone; or "mixtures", and
            they do not have moving statistics beside those of groups.
    """
    if stats == "mixtures" and kind not in ("bn", "bkn"):
        raise RecipeError(
            f"{asked} is mixtures, but norm.kind is {kind}, whose layers do not choose between moving statistics and "
            "those of a group",
            "Measure a run of norm.kind bn or bkn.",
        )
    if stats in ("batch", "both") and kind in POPULATION_ONLY:
        raise RecipeError(
            f"{asked} is {stats}, but norm.kind is {kind}, whose layers know no statistics of a single image",
            "Take population statistics, the only ones there are.",
        )
