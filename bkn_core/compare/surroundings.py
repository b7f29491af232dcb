"""What the runs of a comparison ran on, side by side: what all have in common once, the rest with its runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bkn_core.engine.files import read_json
from bkn_core.errors import InputError

_LEFT_OUT = ("labels", "pixels")  # digests of the data


def surroundings(runs: Sequence[Path]) -> list[tuple[str, list[str]]]:
    """Return each entry of the env.json of runs with its values; a run without one is left out."""
    known = {run.name: dict(_flat("", value)) for run in runs if (value := _read(run / "env.json"))}
    names = dict.fromkeys(name for values in known.values() for name in values)
    return [(name, _values(name, known)) for name in names]


def _values(name: str, known: dict[str, dict[str, str]]) -> list[str]:
    runs: dict[str, list[str]] = {}
    for run, values in known.items():
        if name in values:
            runs.setdefault(values[name], []).append(run)
    if len(runs) == 1:
        return [*runs]
    return [
        f"{value} ({', '.join(names) if len(names) < 4 else f'{len(names)} runs'})" for value, names in runs.items()
    ]


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, part in value.items():
            if not str(key).startswith(_LEFT_OUT):
                yield from _flat(f"{prefix} {key}".strip(), part)
    elif isinstance(value, list):
        yield prefix, ", ".join(map(str, value))
    else:
        yield prefix, "–" if value is None else str(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except InputError:
        return {}
