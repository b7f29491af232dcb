"""What lies under a folder or in a zip file, seen the one way: hidden names left out, nothing unsafe followed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from zipfile import ZipInfo

from bkn_core.data.archives import entry_parts, open_archive, read_entry
from bkn_core.data.pictures import BYTE_LIMIT, is_picture
from bkn_core.errors import InputError

MAC_FOLDER = "__MACOSX"  # what macOS puts beside the files that it packs


class Tree(Protocol):
    """Folders and files by their paths from the root, with slashes; the root itself is the empty path."""

    @property
    def root(self) -> Path:
        """The folder or zip file."""

    def entries(self, folder: str) -> list[tuple[str, bool]]:
        """Return what lies in a folder, in order: each name, and whether it is a folder."""

    def read(self, path: str) -> bytes:
        """Return the content of a file."""

    def stamp(self, path: str) -> str:
        """Return what tells the content of a file without reading it."""


def open_tree(root: Path) -> Tree:
    """Return the tree of a folder or a zip file.

    Raises:
        InputError: A zip file is damaged or not safe to read.
    """
    return FolderTree(root) if os.path.isdir(root) else ZipTree(root)


def beneath(folder: str, name: str) -> str:
    """Return the path of a name in a folder of a tree; either may be empty."""
    return "/".join(part for part in (folder, name) if part)


def files_under(tree: Tree, folder: str) -> Iterator[str]:
    """Yield the path of every file under a folder, at any depth."""
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        for name, is_folder in tree.entries(here):
            if is_folder:
                waiting.append(beneath(here, name))
            else:
                yield beneath(here, name)


class FolderTree:
    """A folder on disk; links are followed as long as they stay in it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def entries(self, folder: str) -> list[tuple[str, bool]]:
        with self._refusing_faults(), os.scandir(self.root / folder) as found:
            return sorted((entry.name, self._is_folder(entry, folder)) for entry in found if _is_visible(entry.name))

    def read(self, path: str) -> bytes:
        file = self.root / path
        try:
            size = file.stat().st_size
            if size <= BYTE_LIMIT:
                return file.read_bytes()
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}", "Restore the file or remove it.") from error
        raise InputError(f"{file} has {size} bytes; at most {BYTE_LIMIT} are read", "Remove it.")

    def stamp(self, path: str) -> str:
        with self._refusing_faults():
            return str(os.stat(self.root / path).st_size)

    def _is_folder(self, entry: os.DirEntry[str], folder: str) -> bool:
        if entry.is_symlink():
            # Unlike Path.resolve, realpath takes links that lead in a circle.
            place = Path(os.path.realpath(entry.path))
            if not place.is_relative_to(os.path.realpath(self.root)):
                raise InputError(
                    f"{entry.path} is a symbolic link out of {self.root}", "Put the files themselves there."
                )
            if Path(os.path.realpath(self.root / folder)).is_relative_to(place):
                raise InputError(f"{entry.path} is a symbolic link to a folder that it lies in", "Remove it.")
        if entry.is_dir():
            return True
        if is_picture(entry.name) and not entry.is_file():  # a pipe would wait for ever, a link may lead nowhere
            raise InputError(f"{entry.path} is not a regular file", "Remove it.")
        return False

    @contextlib.contextmanager
    def _refusing_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = error.filename or self.root
            raise InputError(f"{place} cannot be listed: {error.strerror}", "Check it.") from error


class ZipTree:
    """A zip file, read in memory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._archive = open_archive(root)
        self._files: dict[str, ZipInfo] = {}
        self._folders: dict[str, dict[str, bool]] = {"": {}}
        for entry in self._archive.infolist():
            parts = entry_parts(entry)
            if parts and all(map(_is_visible, parts)):
                self._add(entry, parts)

    def entries(self, folder: str) -> list[tuple[str, bool]]:
        return sorted(self._folders[folder].items())

    def read(self, path: str) -> bytes:
        return read_entry(self._archive, self._files[path], BYTE_LIMIT)

    def stamp(self, path: str) -> str:
        return f"{self._files[path].file_size} {self._files[path].CRC}"

    def _add(self, entry: ZipInfo, parts: tuple[str, ...]) -> None:
        path = "/".join(parts)
        for depth in range(len(parts)):
            folder, name = "/".join(parts[:depth]), parts[depth]
            is_folder = depth + 1 < len(parts) or entry.is_dir()
            if self._folders.setdefault(folder, {}).setdefault(name, is_folder) != is_folder or path in self._files:
                raise InputError(f"{self.root} has the entry {path!r} twice", "Pack the files again.")
        if entry.is_dir():
            self._folders.setdefault(path, {})
        else:
            self._files[path] = entry


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != MAC_FOLDER
