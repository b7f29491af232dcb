"""Every key of a recipe as something to list or to complete: default, meaning, what is allowed."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic.fields import FieldInfo

from bkn_core.errors import RecipeError
from bkn_core.recipe import KEYS, Recipe
from bkn_core.recipe_sections import Section
from bkn_core.recipe_words import choices, keys_called, keys_like, printable, quoted, shown


class RecipeKey(NamedTuple):
    """A key: dotted name, default as a recipe writes it, meaning, what is allowed, and the values that have a name."""

    name: str
    default: str
    meaning: str
    allowed: str
    values: tuple[str, ...]


def recipe_keys(start: str = "") -> list[RecipeKey]:
    """List the keys that begin so, with their section or without.

    Raises:
        RecipeError: there is none.
    """
    sections = {name: type(section).model_fields for name, section in Recipe() if isinstance(section, Section)}
    fields = {name: Recipe.model_fields[name] for name in ("name", "task")}
    fields |= {f"{name}.{key}": field for name, keys in sections.items() for key, field in keys.items()}
    found = [name for name in fields if name.startswith(start) or name.partition(".")[2].startswith(start)]
    if not found:
        likely = keys_called(start, KEYS) or keys_like(start, KEYS)
        what = f" (did you mean {quoted(likely)}?)" if likely else ""
        raise RecipeError(f"no key begins with '{printable(start)}'{what}", "See all of them with `bkn keys`.")
    return [_key(name, fields[name]) for name in found]


def _key(name: str, field: FieldInfo) -> RecipeKey:
    default = field.default if isinstance(field.default, str) else shown(_plain(field.default))
    words = choices(field)
    allowed = ", ".join(words) or field.description or ""
    return RecipeKey(name, default, field.title or "", allowed, tuple(dict.fromkeys(_values(field.annotation))))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _values(kind: Any) -> list[str]:
    """The values of a type that have names: those of a choice, true and false, null."""
    if get_origin(kind) is Literal:
        return [*get_args(kind)]
    if kind is bool:
        return ["true", "false"]
    if kind is type(None):
        return ["null"]
    return [] if get_origin(kind) in (dict, tuple) else [value for part in get_args(kind) for value in _values(part)]
