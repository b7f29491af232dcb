"""Options and arguments that several verbs share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from bkn_cli.completion import complete_word

NO_VALUE = ""  # the name of a flag's value in the help: it has none
DEVICES = "auto, cpu, cuda, cuda:N or mps"

Json = Annotated[
    bool,
    typer.Option("--json", metavar=NO_VALUE, help="Print one JSON object on standard output, and nothing else there."),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", metavar=NO_VALUE, help="Show the traceback of an unexpected error.")
]
Device = Annotated[
    str | None, typer.Option(metavar="DEVICE", help=f"Where to compute: {DEVICES}; default the recipe's.")
]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE|KEY=VALUE",
        help="A recipe, by its file or the name of a shipped one, default digits_micro; "
        "then any of its keys with another value, such as norm.kind=bn train.epochs=3; `bkn keys` lists them.",
        show_default=False,
        autocompletion=complete_word,
    ),
]


def path(text: str) -> Path:
    """Read a path; that of an unset shell variable is empty and would stand for the working folder."""
    if (fault := _fault(text)) is not None:
        raise typer.BadParameter(f"the path {fault}")
    return Path(text)


def _fault(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{ascii(text)[1:-1]} holds a byte that is no UTF-8 text"
    return None if text else "is empty"


def split_words(words: list[str] | None) -> tuple[list[str], list[str]]:
    """Part names (recipes, runs) from KEY=VALUE words."""
    from bkn_core.errors import RecipeError

    found = words or []
    for word in found:
        if (fault := _fault(word)) is not None:
            raise RecipeError(f"a word of the command {fault}")
    return [w for w in found if not _is_override(w)], [w for w in found if _is_override(w)]


def data_words(names: list[str]) -> tuple[list[str], list[str]]:
    """Part recipes from the folders, zip and .npz files of data, which become data.root words.

    Raises:
        RecipeError: a folder is one of a run.
    """
    from bkn_core.errors import RecipeError
    from bkn_core.recipe import shipped_recipes

    recipes, words = [], []
    for name in names:
        if (Path(name) / "config.yaml").is_file():
            raise RecipeError(f"{name} is the folder of a run", f"Continue it with `bkn train --resume {name}`.")
        is_data = name not in shipped_recipes() and (
            os.path.isdir(name) or Path(name).suffix.lower() in (".zip", ".npz")
        )
        if is_data:
            words.append(f"data.root={json.dumps(name, ensure_ascii=False)}")
        else:
            recipes.append(name)
    return recipes, words


def _is_override(word: str) -> bool:
    """Tell KEY=VALUE from a path that holds an equals sign."""
    key, equals, _ = word.partition("=")
    return bool(equals) and "/" not in key
