"""The kinds of normalization, as recipes and conversions name them."""

from __future__ import annotations

from typing import Literal, get_args

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
