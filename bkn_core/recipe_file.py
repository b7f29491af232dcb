"""Recipe text to plain values that remember where they were written: YAML files, their parents, KEY=VALUE words."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from bkn_core.errors import InputError, RecipeError
from bkn_core.recipe_words import meant, printable, printable_path, shown

LARGEST_FILE = 1_000_000
MOST_EVENTS = 10_000
DEEPEST_NESTING = 10
LONGEST_CHAIN = 8
REFUSED: Final = object()  # stands for a value that has been reported already

_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
# The numbers of YAML 1.2: unlike by PyYAML's own rule, 1e-3 is one, and 1_000 and 1:30 are not.
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z|[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z")
_WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


class Entry(NamedTuple):
    """A value and the words that say where it was written."""

    value: Any
    place: str


Key = tuple[str, ...]
Entries = dict[Key, Entry]


def recipe_error(faults: list[str]) -> RecipeError:
    """All the faults as one error."""
    title = f"the recipe has {len(faults)} faults:\n" if len(faults) > 1 else ""
    return RecipeError(title + "\n".join(faults), "Correct what is named above; nothing was built or written.")


class _Composer:
    """One YAML document to dicts of entries, lists and scalars, without tags, anchors or aliases."""

    def __init__(self, text: str, place: Callable[[int], str], faults: list[str]) -> None:
        self._events: Iterator[yaml.Event] = yaml.parse(text, Loader=yaml.SafeLoader)
        self._place, self._faults, self._count = place, faults, 0

    def document(self) -> Any:
        """The value of the document, null where there is none.

        Raises:
            RecipeError: the text cannot be read to its end.
        """
        self._next()
        if isinstance(self._next(), yaml.StreamEndEvent):
            return None
        value = self._value(self._next(), ())
        self._next()
        extra = self._next()
        if not isinstance(extra, yaml.StreamEndEvent):
            return self._fault(extra, "a second YAML document starts here; a recipe is one document")
        return value

    def _next(self) -> Any:
        try:
            event: Any = next(self._events)
        # PyYAML lets ValueError and OverflowError out of impossible escapes such as "\UFFFFFFFF".
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            mark = getattr(error, "problem_mark", None)
            reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
            self._faults.append(f"{self._place(mark.line if mark else 0)}: not valid YAML: {printable(str(reason))}")
            raise recipe_error(self._faults) from error
        self._count += 1
        if self._count > MOST_EVENTS:
            self._fault(event, f"more than {MOST_EVENTS} YAML elements; a recipe has a hundred or so")
            raise recipe_error(self._faults)
        return event

    def _fault(self, event: Any, text: str) -> object:
        self._faults.append(f"{self._place(event.start_mark.line)}: {text}")
        return REFUSED

    def _value(self, event: Any, path: Key) -> Any:
        if isinstance(event, yaml.AliasEvent):
            return self._fault(
                event, f"{_dotted(path)} is an alias (*{printable(str(event.anchor))}); give a plain value"
            )
        value = self._scalar(event) if isinstance(event, yaml.ScalarEvent) else self._collection(event, path)
        if event.tag is not None:
            return self._fault(event, f"{_dotted(path)} has a tag ({printable(str(event.tag))}); give a plain value")
        if event.anchor is not None:
            return self._fault(event, f"{_dotted(path)} has an anchor (&{printable(event.anchor)}); give a plain value")
        return value

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        text: str = event.value
        if any("\ud800" <= character <= "\udfff" for character in text):
            return self._fault(event, f"{shown(text)} holds half a character (a lone surrogate)")
        if event.style is not None:
            return text
        if _INTEGER.fullmatch(text):
            return int(text)
        if NUMBER.match(text):
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return _WORDS.get(text, text)

    def _collection(self, event: yaml.Event, path: Key) -> Any:
        if len(path) >= DEEPEST_NESTING:
            self._fault(event, f"{_dotted(path)} is nested more than {DEEPEST_NESTING} levels deep")
            raise recipe_error(self._faults)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path)
        values: list[Any] = []
        while not isinstance(item := self._next(), yaml.SequenceEndEvent):
            values.append(self._value(item, (*path, str(len(values)))))
        return values

    def _mapping(self, path: Key) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            place = self._place(event.start_mark.line)
            name: str = event.value if isinstance(event, yaml.ScalarEvent) else "?"
            key = self._value(event, (*path, name))
            value = self._value(self._next(), (*path, name))
            if not isinstance(event, yaml.ScalarEvent):
                self._fault(event, f"a key of {_dotted(path)} is not text")
            elif name in entries:
                self._fault(event, f"{_dotted((*path, name))} is given twice (first at {entries[name].place})")
            elif key is not REFUSED:
                entries[name] = Entry(value, place)
        return entries


def _dotted(path: Key) -> str:
    return printable(".".join(path)) or "the recipe"


def _plain(value: Any) -> Any:
    """The value without the places; refused where any part of it is."""
    if isinstance(value, dict):
        pairs = {name: _plain(entry.value) for name, entry in value.items()}
        return REFUSED if REFUSED in pairs.values() else pairs
    items = [_plain(item) for item in value] if isinstance(value, list) else value
    return REFUSED if isinstance(items, list) and REFUSED in items else items


class RecipeReader:
    """Reads what a recipe is made of, and gathers every fault on the way."""

    def __init__(self, sections: Mapping[str, Collection[str]]) -> None:
        self.sections = sections
        self.faults: list[str] = []

    def file(self, path: Path) -> Entries:
        """The entries of a file over those of its parents.

        Raises:
            InputError: a file is missing or unreadable.
            RecipeError: a file is no YAML mapping.
        """
        layers: list[Entries] = []
        chain: list[Path] = []
        child: Path | None = path
        told = ""
        while child is not None:
            layer = self.text(_read(child, told), printable_path(child))
            chain.append(child)
            if layers:
                layer.pop(("name",), None)
            layers.append(layer)
            child, told = self._parent(layer.pop(("extends",), None), chain)
        return {key: entry for layer in reversed(layers) for key, entry in layer.items()}

    def override(self, entries: Entries, word: str) -> Entries:
        """The entries under those of a KEY=VALUE word; `section.key.name=VALUE` sets one name of a mapping."""
        place = f"command line '{printable(word)}'"
        name, equals, text = word.partition("=")
        parts = tuple(part.strip() for part in name.split("."))
        if not equals or not all(parts) or not name.isprintable():
            self.faults.append(f"{place}: this is not KEY=VALUE; write for example norm.kind=bn")
            return entries
        try:
            value = _Composer(text, lambda _: place, self.faults).document()
        except RecipeError:
            value = REFUSED
        if parts == ("extends",):
            self.faults.append(f"{place}: extends is for files only; give the parent as the recipe")
            return entries
        if parts[0] not in self.sections or len(parts) not in (2, 3):
            return entries | self._flat({".".join(parts): Entry(value, place)})
        value, old = _plain(value), entries.get(parts[:2], Entry({}, place)).value
        if len(parts) == 3 and value is not REFUSED:
            value = {**(old if isinstance(old, dict) else {}), parts[2]: value}
        return entries | {parts[:2]: Entry(value, place)}

    def text(self, text: str, label: str) -> Entries:
        """The entries of a text alone; a RecipeError where it is no YAML mapping."""
        tree = _Composer(text, lambda line: f"{label}:{line + 1}", self.faults).document()
        if isinstance(tree, dict):
            return self._flat(tree)
        if tree is not REFUSED:
            what = "is empty" if tree is None else f"holds {shown(_plain(tree))}"
            self.faults.append(f"{label}:1: the file {what}; a recipe is a mapping such as norm: {{kind: bkn}}")
        raise recipe_error(self.faults)

    def _flat(self, tree: dict[str, Entry]) -> Entries:
        entries: Entries = {}
        for name, (value, place) in tree.items():
            if name not in self.sections:
                entries[name,] = Entry(_plain(value), place)
            elif isinstance(value, dict):
                entries |= {(name, key): Entry(_plain(entry.value), entry.place) for key, entry in value.items()}
            elif value is not REFUSED:
                first = next(iter(self.sections[name]))
                what = f"{name} is {shown(_plain(value))}; give a mapping of keys to values"
                self.faults.append(f"{place}: {what}, or one key in a word of its own, such as {name}.{first}=...")
        return entries

    def _parent(self, entry: Entry | None, chain: list[Path]) -> tuple[Path | None, str]:
        if entry is None or entry.value is REFUSED:
            return None, ""
        if not isinstance(entry.value, str) or not entry.value.isprintable() or not entry.value:
            self.faults.append(f"{entry.place}: extends is {shown(entry.value)}; give the path of one YAML file")
            return None, ""
        parent = chain[-1].parent / entry.value
        circle = os.path.realpath(parent) in map(os.path.realpath, chain)
        if circle or len(chain) >= LONGEST_CHAIN:
            names = " -> ".join(printable(path.name) for path in [*chain, parent])
            what = "in a circle" if circle else f"through more than {LONGEST_CHAIN} files"
            self.faults.append(f"{entry.place}: extends leads {what}: {names}")
            return None, ""
        return parent, f" (extends at {entry.place})"


def _read(path: Path, told: str) -> str:
    name = f"recipe {printable_path(path)}{told}"
    try:
        # Only a regular file: a pipe or a device could keep the reader waiting for ever.
        if not path.is_file():
            problem = "is not a file" if path.exists() else "does not exist"
            raise InputError(f"{name} {problem}", "Give the path of a YAML file or the bare name of a shipped recipe.")
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {printable(str(error))}") from error
    if len(data) > LARGEST_FILE:
        raise RecipeError(f"{name} is larger than {LARGEST_FILE} bytes; a recipe has a few thousand")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(f"{printable_path(path)}:{line}: not UTF-8 text", "Save the recipe as UTF-8.") from error


def _shipped_folder() -> Path:
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in _shipped_folder().glob("*.yaml"))


def find_recipe(source: str | Path | None) -> Path:
    """The file that a path, a bare name or nothing (the default recipe) stands for."""
    name = "digits_micro" if source is None else str(source)
    shipped = shipped_recipes()
    if name in shipped and not isinstance(source, Path):
        return _shipped_folder() / f"{name}.yaml"
    path = Path(name)
    if isinstance(source, Path) or path.suffix in (".yaml", ".yml") or len(path.parts) != 1 or os.path.isfile(name):
        return path
    hint = "Give the path of a YAML file or one of these names."
    known = f"'{printable(name)}' is no shipped recipe{meant(name, shipped)}; there are {', '.join(shipped)}"
    raise RecipeError(known, hint)
