"""Pictures that somebody names one by one: files, folders and zip files at any depth, patterns."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from bkn_core.engine.pictures import decode, is_picture, open_picture, resize
from bkn_core.engine.preprocess import Preprocess
from bkn_core.engine.trees import FolderTree, files_under, open_tree
from bkn_core.errors import InputError

_HINT = "Name files, folders or zip files of pictures."


class NamedPicture(NamedTuple):
    """A picture that has not been read yet."""

    name: str
    read: Callable[[], bytes]


def listed(names: Sequence[str]) -> list[NamedPicture]:
    """Return all pictures that names stand for, each once.

    Raises:
        InputError: there is none behind a name, or something beside them is not safe to read.
    """
    found: dict[str, NamedPicture] = {}
    for name in names:
        for picture in _under(Path(name)) if Path(name).exists() else _matching(name):
            found.setdefault(picture.name, picture)
    if not found:
        raise InputError("no picture is named", _HINT)
    return list(found.values())


def _matching(pattern: str) -> Iterator[NamedPicture]:
    paths = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else []
    if not paths:
        raise InputError(f"there is no picture {pattern}", _HINT)
    for path in paths:
        yield from _under(Path(path))


def _under(path: Path) -> Iterator[NamedPicture]:
    if not path.is_dir() and path.suffix.lower() != ".zip":
        yield NamedPicture(str(path), lambda: FolderTree(path.parent).read(path.name))
        return
    tree, count = open_tree(path), 0
    for name in sorted(filter(is_picture, files_under(tree, ""))):
        count += 1
        yield NamedPicture(f"{path}/{name}", lambda name=name: tree.read(name))  # type: ignore[misc]
    if not count:
        raise InputError(f"{path} holds no picture", _HINT)


def pixels_or_fault(picture: NamedPicture, preprocess: Preprocess) -> Tensor | InputError:
    """Decode a picture to uint8 (C, H, W) as a model wants it, or return why that cannot be done."""
    try:
        pixels = decode(open_picture(picture.read(), picture.name), preprocess.color, picture.name)
    except InputError as error:
        return error
    return resize(pixels[None], preprocess.image_size, preprocess.resize)[0]
