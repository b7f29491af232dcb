"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from bkn_core.errors import InputError, OutputError
from bkn_core.recipe_words import shown


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a file to write aside; on leaving it is flushed to the disk and renamed, on an error removed.

    Raises:
        OutputError: the file could not be written; what stood at `path` is untouched.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(
            f"{path} could not be written: {error.strerror or error}", "Free some space or choose another folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # gone already, or on a disk that lets nothing be removed
            aside.unlink()


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left aside in a folder: of one file, or of all."""
    pattern = f".{'*' if name is None else glob.escape(name)}.*.part"
    for aside in folder.glob(pattern):
        if not _is_running(aside.suffixes[-2][1:]):
            with contextlib.suppress(OSError):
                aside.unlink()


def _is_running(process: str) -> bool:
    try:
        if os.name != "nt":  # on Windows this would end the process
            os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except (ValueError, PermissionError):
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    write_with(path, lambda file: file.write(text.encode()))


def write_with(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a binary file whole through a function that is given the open file."""
    with replacing(path) as aside, open(aside, "wb") as file:
        write(file)
        file.flush()


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole, with null in the place of numbers that are not finite."""
    write_text(path, json.dumps(finite(value), indent=2) + "\n")


def finite(value: Any) -> Any:
    """Return a value of dicts, lists and numbers with None for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_bytes(path: Path) -> bytes:
    """Read a file of a run.

    Raises:
        InputError: it cannot be read, or is no regular file (a pipe would be waited for).
    """
    try:
        if not path.is_file():
            raise OSError("it is not a regular file" if path.exists() else "it is not there")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}", "Give a folder that `bkn train` made.") from error


def read_text(path: Path) -> str:
    """Read a text file of a run.

    Raises:
        InputError: as `read_bytes`, or it is no text.
    """
    try:
        return read_bytes(path).decode()
    except ValueError as error:
        raise InputError(f"{path} is no text: {error}", "Give a folder that `bkn train` made.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a run.

    Raises:
        InputError: as `read_text`, or it is no JSON object.
    """
    try:
        value = json.loads(read_text(path))
        if not isinstance(value, dict):
            raise ValueError(f"it holds {shown(value)}, which is no JSON object")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}", "Give a folder that `bkn train` made.") from error
    return value
