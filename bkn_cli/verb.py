"""A verb that takes keys of a recipe, and knows them where somebody writes one as an option."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand
from typer.exceptions import TyperException

from bkn_cli.light import recipes_alone


class RecipeVerb(TyperCommand):
    """A command whose unknown option `--epochs 3` is answered with the key: `train.epochs=3`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of the command."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except TyperException as error:
            option = getattr(error, "option_name", "")
            options = [name.lstrip("-") for name in getattr(error, "possibilities", None) or []]
            if words := _as_words(option, options, given):
                error.message = f"No such option: {option}; as a key of the recipe it is {words}"
                error.possibilities = None  # type: ignore[attr-defined]
            raise


def _as_words(option: str, options: list[str], given: list[str]) -> str:
    """The words that give a recipe's keys what an option was to say; none where another option was meant."""
    with recipes_alone():
        from bkn_core.recipe import KEYS
        from bkn_core.recipe_words import keys_called, keys_like, nearest

    name = option.lstrip("-").replace("-", "_").lower()
    firsts = {key.partition(".")[0]: key for key in reversed(KEYS)}
    names = [key.partition(".")[2] for key in KEYS]
    keys = keys_called(name, KEYS) or ([firsts[name]] if name in firsts else [])
    if not keys and name and nearest(name, [*options, *names]) not in options:
        keys = keys_like(name, KEYS)
    same = len({key.partition(".")[2] for key in keys}) == 1
    return (" or " if same else " ").join(f"{key}={_value(option, given)}" for key in keys)


def _value(option: str, given: list[str]) -> str:
    """What stands behind an option, after an equals sign or as the next word."""
    for word, after in zip(given, [*given[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == option:
            return value if equals else after if after and not after.startswith("--") else "VALUE"
    return "VALUE"
