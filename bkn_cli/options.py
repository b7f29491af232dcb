"""Options and arguments that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the traceback of an unexpected error.")]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]|mps", help="Where to compute; auto prefers a GPU.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE]...",
        help="A recipe (a YAML file or the name of a shipped one; default digits_micro), then any of its keys with "
        "another value, such as norm.kind=bn batch.statistics=2 train.epochs=3.",
        show_default=False,
    ),
]


def split_words(words: list[str] | None) -> tuple[list[str], list[str]]:
    """Part names (recipes, runs) from KEY=VALUE words."""
    found = words or []
    return [w for w in found if "=" not in w], [w for w in found if "=" in w]
