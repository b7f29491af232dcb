"""Values that nobody asked for give way to those that were, where both cannot be: each with a note."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from bkn_core.recipe_file import Entries, Entry, Key
from bkn_core.recipe_words import shown

_LOG = logging.getLogger("bkn")
Values = Mapping[str, Mapping[str, Any]]


class Bend(NamedTuple):
    """What a key gives way to, and the value that it then has."""

    to: tuple[Key, ...]
    value: Callable[[Values, Collection[Key]], Any]


def _multiple(values: Values, asked: Collection[Key]) -> int:
    """The largest gradient batch of whole groups, and of whole forwards that a word asked for, up to the given one.

    One group or forward at least.
    """
    gradient, statistics, per_device = (values["batch"][key] for key in ("gradient", "statistics", "per_device"))
    is_whole = ("batch", "per_device") in asked and isinstance(per_device, int) and per_device % statistics == 0
    part = per_device if is_whole and per_device else statistics
    return int(max(gradient // part, 1) * part)


_BENDS = {
    ("batch", "gradient"): Bend((("batch", "statistics"),), _multiple),
    ("batch", "per_device"): Bend((("batch", "gradient"), ("batch", "statistics")), lambda *_: None),
    ("norm", "learn_gain"): Bend((("norm", "gain"),), lambda *_: False),
    ("optim", "nesterov"): Bend((("optim", "momentum"),), lambda *_: False),
}


class Asked:
    """The keys that words of the command asked for, and what gave way to them.

    Args:
        keys: those keys.
        defaults: of every key of every section.
    """

    def __init__(self, keys: Collection[Key], defaults: Values) -> None:
        self.keys, self.defaults = keys, defaults
        self.old: dict[Key, Entry] = {}

    def bend(self, entries: Entries, keys: Collection[Key]) -> bool:
        """Change, in place, one of the keys that cannot be together; whether there was one to change."""
        for key, (masters, value) in _BENDS.items():
            bends = key in keys and key not in self.keys and key not in self.old
            if bends and any(master in self.keys and master in keys for master in masters):
                self.old[key] = entries.get(key, Entry(self.defaults[key[0]][key[1]], "the default"))
                entries[key] = Entry(value(self._values(entries), self.keys), self.old[key].place)
                return True
        return False

    def tell(self, values: Values) -> None:
        """Log what gave way, once all of it is known."""
        for (section, key), (old, place) in self.old.items():
            reasons = [f"{a}.{b}={shown(values[a][b])}" for a, b in _BENDS[section, key].to if (a, b) in self.keys]
            new = shown(values[section][key])
            _LOG.warning(
                "%s.%s is %s, not %s (%s), to fit %s", section, key, new, shown(old), place, ", ".join(reasons)
            )

    def _values(self, entries: Entries) -> Values:
        given = {section: dict(keys) for section, keys in self.defaults.items()}
        for key, entry in entries.items():
            if len(key) == 2 and key[0] in given:
                given[key[0]][key[1]] = entry.value
        return given
