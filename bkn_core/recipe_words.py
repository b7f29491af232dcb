"""What a value that was given is, and what is allowed in its place, in words of this project."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

# What layers, other programs and habit call keys of a recipe.
_ALSO = {
    "batch_size": ["batch.gradient", "batch.per_device"],
    "gradient_batch_size": ["batch.gradient"],
    "statistics_batch_size": ["batch.statistics"],
    "learning_rate": ["optim.lr"],
    "wd": ["optim.weight_decay"],
    "optimizer": ["optim.name"],
    "dataset": ["data.name"],
    "early_stopping": ["train.patience"],
    "mixup_alpha": ["data.mixup"],
    "cutmix_alpha": ["data.cutmix"],
    "num_workers": ["train.workers"],
}


def printable(text: str, longest: int = 80) -> str:
    """The text, escaped where a terminal could not show it and cut where it is long."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= longest else text[: longest - 3] + "..."


def printable_path(path: object) -> str:
    """A path in full, however long, as one must be able to open it."""
    return printable(str(path), 10_000)


def shown(value: object) -> str:
    """A value as a recipe would write it, on one short line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return printable(repr(value))


def nearest(word: str, names: Collection[str]) -> str:
    """The name most like a word, nothing where none is near; swapped letters beat every other likeness."""
    word = word[:80].lower()
    swapped = [name for name in names if sorted(name) == sorted(word)]
    return next(iter(swapped or get_close_matches(word, names, 1)), "")


def meant(word: str, names: Collection[str]) -> str:
    """Asks whether the name most like `word` was meant."""
    name = nearest(word, names)
    return f" (did you mean '{name}'?)" if name else ""


def keys_called(word: str, keys: Collection[str]) -> list[str]:
    """The dotted keys that a word names, whatever their section; two of them where one is not enough."""
    return _ALSO.get(word) or [key for key in keys if key == word or key.endswith(f".{word}")]


def keys_like(word: str, keys: Collection[str]) -> list[str]:
    """The dotted keys whose name, with its section or without, is most like a word."""
    near = nearest(word, [*keys, *_ALSO, *(key.partition(".")[2] for key in keys)])
    return keys_called(near, keys) if near else []


def quoted(keys: Collection[str]) -> str:
    """Keys as a question lists them: all of those that stand for one size, or one of those with the same name."""
    return (" and " if keys in _ALSO.values() else " or ").join(f"'{key}'" for key in keys)


def refusal(name: str, value: object, field: FieldInfo) -> str:
    """What is wrong with the value of a field, and what is allowed there."""
    return f"{name} is {shown(value)}; {_allowed(field)}{meant(str(value), choices(field))}"


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The words that a field can be, nothing where it is of another kind."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def _allowed(field: FieldInfo) -> str:
    words = choices(field)
    return f"choose one of {', '.join(words)}" if words else f"give {field.description}"


def first_fault(error: ValidationError, model: type[BaseModel], values: Any) -> str:
    """The first fault that a model found in values that a file holds."""
    detail = error.errors(include_url=False, include_input=False)[0]
    names: list[str] = []
    field, inside = None, model
    for name in map(str, detail["loc"]):
        if name not in inside.model_fields:
            break
        field, values = inside.model_fields[name], values.get(name) if isinstance(values, Mapping) else None
        names.append(name)
        held = next((kind for kind in (field.annotation, *get_args(field.annotation)) if _is_model(kind)), None)
        if held is None:
            break
        inside = held
    dotted, full = (".".join(map(str, part)) for part in (names, detail["loc"]))
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    if detail["type"] == "extra_forbidden":
        return f"{printable(full)} is not known; known are {', '.join(inside.model_fields)}"
    if detail["type"] == "missing" and field is not None:
        return f"{dotted} is missing; {_allowed(field)}"
    return refusal(dotted, values, field) if field is not None else f"it is {shown(values)}; give a mapping"


def _is_model(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
