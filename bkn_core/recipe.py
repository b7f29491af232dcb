"""The recipe of a run: its sections together, read from YAML and KEY=VALUE words, checked, frozen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from bkn_core import recipe_file
from bkn_core.errors import RecipeError
from bkn_core.kinds import POPULATION_ONLY
from bkn_core.recipe_bending import Asked
from bkn_core.recipe_compare import CompareConfig
from bkn_core.recipe_file import Entries, Entry, Key, shipped_recipes
from bkn_core.recipe_sections import (
    OWN_DATA,
    BatchConfig,
    DataConfig,
    EvalConfig,
    FileName,
    LogConfig,
    ModelConfig,
    NormConfig,
    OptimConfig,
    Section,
    TrainConfig,
)
from bkn_core.recipe_words import keys_called, keys_like, nearest, printable, printable_path, quoted, refusal

__all__ = [
    "BatchConfig",
    "CompareConfig",
    "DataConfig",
    "EvalConfig",
    "NormConfig",
    "OptimConfig",
    "Recipe",
    "dump_recipe",
    "load_recipe",
    "parse_recipe",
    "shipped_recipes",
]


class Recipe(Section):
    """Everything that decides a run; a resolved recipe, written down, loads to an equal one."""

    version: Annotated[int, Field(ge=1, le=1, description="1")] = Field(default=1, title="version of this format")
    name: FileName = Field(
        default="digits_micro", title="first part of the run folder's name; default that of the recipe"
    )
    task: Annotated[Literal["classification", "segmentation"], Field(description="classification or segmentation")] = (
        Field(default="classification", title="what the network learns")
    )
    model: ModelConfig = ModelConfig()
    norm: NormConfig = NormConfig()
    batch: BatchConfig = BatchConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    compare: CompareConfig = CompareConfig()

    @property
    def resolved_gain(self) -> float | Literal["auto"]:
        """The initial gain, or "auto" where the filter computes it; BatchNorm is gain 1."""
        return 1.0 if self.norm.kind == "bn" else self.norm.gain

    @property
    def eval_stats(self) -> Literal["population", "batch", "both"]:
        """The statistics of evaluation: each image by itself where training took each by itself and layers can."""
        if self.norm.kind in POPULATION_ONLY:
            return "population"
        auto: Literal["batch", "population"] = "batch" if self.batch.statistics == 1 else "population"
        return auto if self.eval.stats == "auto" else self.eval.stats


_SECTIONS = {name: type(section).model_fields for name, section in Recipe() if isinstance(section, Section)}
_DEFAULTS = {name: section.model_dump() for name, section in Recipe() if isinstance(section, Section)}
KEYS = [f"{name}.{key}" for name, fields in _SECTIONS.items() for key in fields]


def load_recipe(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and check a recipe: defaults < parents < the file < KEY=VALUE words.

    Sizes and flags that no word names give way to words that they do not fit, each with a warning of the log `bkn`.

    Args:
        source: path of a YAML file, bare name of a shipped recipe, or None for `digits_micro`.
        overrides: words such as `norm.kind=bn`; the value is YAML, and a later word wins.

    Raises:
        InputError: a file is missing or unreadable.
        RecipeError: every fault there is, each with its file and line (or its word), key, value and what is allowed.
    """
    path = recipe_file.find_recipe(source)
    reader = recipe_file.RecipeReader(_SECTIONS)
    name = re.sub(r"[^\w.-]+", "-", path.stem).lstrip("-.")[:100] or "recipe"
    read = reader.file(path)
    entries = {("name",): Entry(name, printable_path(path))} | (
        _without_unread_root(read) if path.name == "config.yaml" else read
    )
    own = dict(entries)
    for word in overrides:
        entries = reader.override(entries, word)
    asked = Asked({key for key, entry in entries.items() if entry is not own.get(key)}, _DEFAULTS)
    recipe = _faultless(entries, reader, asked)
    asked.tell(recipe.model_dump(mode="json"))
    return recipe


def override_data(known: DataConfig, overrides: Sequence[str], label: str) -> DataConfig:
    """The data of a trained model under `data.KEY=VALUE` words.

    Args:
        known: what the model was trained on.
        overrides: the words.
        label: what errors call the place where `known` stands.

    Raises:
        RecipeError: a word of another section, and every fault there is.
    """
    others = [word for word in overrides if not word.startswith("data.")]
    if others:
        raise RecipeError(f"{others[0]!r} cannot change a trained model", "Only data.KEY=VALUE words fit here.")
    reader = recipe_file.RecipeReader(_SECTIONS)
    entries: Entries = {("data", key): Entry(value, label) for key, value in known.model_dump(mode="json").items()}
    given = {word.partition("=")[0].strip() for word in overrides}
    if known.name in OWN_DATA and "data.root" in given:
        del entries["data", "name"]  # the given root says what it is
    elif known.name in OWN_DATA and "data.name" in given:
        del entries["data", "root"]
    for word in overrides:
        entries = reader.override(entries, word)
    data = _faultless(entries, reader).data
    for key in ("image_size", "resize"):
        if getattr(data, key) != getattr(known, key):
            raise RecipeError(f"data.{key} cannot change for a trained model", "It takes pictures as it was trained.")
    return data


def parse_recipe(text: str, label: str) -> Recipe:
    """Read a recipe that a file carries as text: plain values alone, and no parents.

    Args:
        text: what `dump_recipe` gave.
        label: what errors call it.

    Raises:
        RecipeError: every fault there is, each with its line, key, value and what is allowed.
    """
    if len(text) > recipe_file.LARGEST_FILE:
        raise RecipeError(f"{label} has more than {recipe_file.LARGEST_FILE} characters; a recipe has a few thousand")
    reader = recipe_file.RecipeReader(_SECTIONS)
    return _faultless(_without_unread_root(reader.text(text, label)), reader)


def _without_unread_root(saved: Entries) -> Entries:
    """What a run saved, without the root of digits, which read none: earlier versions kept what was given."""
    kind = saved.get(("data", "name"))
    unread = ("data", "root") if kind is not None and kind.value == "digits" else None
    return {key: entry for key, entry in saved.items() if key != unread}


def _faultless(entries: Entries, reader: recipe_file.RecipeReader, asked: Asked | None = None) -> Recipe:
    recipe = _checked(dict(entries), reader.faults, asked or Asked((), _DEFAULTS))
    if reader.faults:
        raise recipe_file.recipe_error(reader.faults)
    return recipe


def _checked(entries: Entries, faults: list[str], asked: Asked) -> Recipe:
    """The recipe of the entries; wrong ones are left out and the rest checked again, so that no fault hides another."""
    left_out = {key for key, entry in entries.items() if entry.value is recipe_file.REFUSED}
    while True:
        values: dict[str, Any] = {name: {} for name in _SECTIONS}
        for key, entry in entries.items():
            if key not in left_out:
                (values if len(key) == 1 else values[key[0]])[key[-1]] = entry.value
        try:
            return Recipe.model_validate(values)
        except ValidationError as error:
            # A union reports one error per member: one per key is enough.
            found = {_keys(detail): detail for detail in error.errors(include_url=False, include_input=False)}
        for keys, detail in found.items():
            if left_out.isdisjoint(keys) and asked.bend(entries, keys):
                break
            if left_out.isdisjoint(keys):
                places = dict.fromkeys(entries[key].place for key in keys if key in entries)
                faults.append(f"{', '.join(places)}: {_explanation(keys[0], detail, entries)}")
        else:
            left_out.update(*found)


def _keys(detail: ErrorDetails) -> tuple[Key, ...]:
    """The key of a field's error, or all those that the text of a rule names."""
    section, *rest = (str(part) for part in detail["loc"])
    if detail["type"] == "value_error":
        return tuple((section, key) for key in dict.fromkeys(re.findall(rf"{section}\.(\w+)", detail["msg"])))
    return ((section, rest[0]) if section in _SECTIONS else (section,),)


def _explanation(key: Key, detail: ErrorDetails, entries: Entries) -> str:
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    name = printable(".".join(key))
    fields = _SECTIONS[key[0]] if len(key) == 2 else Recipe.model_fields
    if detail["type"] == "extra_forbidden":
        return f"{name} is not a key{_right_key(key, [*fields] if len(key) == 2 else [*fields, 'extends'])}"
    return refusal(name, entries[key].value, fields[key[-1]])


def _right_key(key: Key, names: list[str]) -> str:
    """The key that was meant, be it in another section; all names of this one where none is near."""
    dotted = ".".join(key)
    if dotted in KEYS:
        return f" here; write it as {dotted.replace('.', ': {')}: ...}}"
    near = nearest(key[-1], names)
    here = [".".join([*key[:-1], near])] if near else []
    likely = keys_called(key[-1], KEYS) or here or keys_like(key[-1], KEYS)
    return f" (did you mean {quoted(likely)}?)" if likely else f"; choose one of {', '.join(names)}"


class _Dumper(yaml.SafeDumper):
    """Quotes every text that the reader would take for a number."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", recipe_file.NUMBER, list("-+.0123456789"))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every key, in the order of the classes above."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
