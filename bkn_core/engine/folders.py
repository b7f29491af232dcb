"""Images in folders, one per class: ROOT/{train, test or val}/CLASS/*, on disk or in a zip file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipInfo

import torch

from bkn_core.engine.archives import entry_parts, open_archive, read_entry
from bkn_core.engine.pictures import BYTE_LIMIT, SUFFIXES, open_picture
from bkn_core.engine.sources import PictureSource
from bkn_core.errors import InputError

TRAIN = "train"
TEST_NAMES = ("test", "val")
SPLITS = (TRAIN, *TEST_NAMES)
THREADS = 2
VALIDATION = "validation"
LAYOUT = "Expected ROOT/train/CLASS/*.png (or jpg ...) and ROOT/test/CLASS/* or ROOT/val/CLASS/*; ROOT may be a .zip."
VALIDATION_LAYOUT = "Expected FOLDER/CLASS/*.png (or jpg ...), with the classes of the training images."

# Paths of the pictures, relative to the root, of each (split, class).
Listing = dict[tuple[str, str], list[str]]


class Files(NamedTuple):
    """How a file is read by its path, and what tells its content without reading it."""

    read: Callable[[str], bytes]
    stamp: Callable[[str], str]


def open_image_folder(root: Path) -> tuple[PictureSource, PictureSource]:
    """List the training and test images of a folder or a zip file; where both exist, `test` goes before `val`.

    Raises:
        InputError: A split or a class is missing or empty, or something under the root is not safe to read.
    """
    if not os.path.exists(root):
        raise InputError(f"data.root {root} does not exist", LAYOUT)
    listing, files = _list_folder(root) if os.path.isdir(root) else _list_archive(root)
    splits = {split for split, _ in listing}
    test = next((name for name in TEST_NAMES if name in splits), None)
    if TRAIN not in splits or test is None:
        raise InputError(f"data.root {root} has no {' or '.join(TEST_NAMES) if test is None else TRAIN} folder", LAYOUT)
    classes = tuple(sorted(name for split, name in listing if split == TRAIN))
    _refuse_uneven(listing, test, root)
    return _source(listing, TRAIN, classes, root, files), _source(listing, test, classes, root, files)


def open_validation_folder(folder: Path, root: Path, classes: tuple[str, ...]) -> PictureSource:
    """List the images of FOLDER/CLASS/*, which are to be others than those the root holds for training and testing.

    Args:
        folder: The folder.
        root: The folder or zip file that `open_image_folder` opened.
        classes: The classes of its training images.

    Raises:
        InputError: The folder is missing or the training or test folder itself, a class is missing, unknown or empty,
            or something under it is not safe to read.
    """
    if not os.path.isdir(folder):
        raise InputError(f"data.validation {folder} is no folder", VALIDATION_LAYOUT)
    for split, purpose in ((TRAIN, "training"), (_test_folder(root), "test")):
        if os.path.realpath(folder) == os.path.realpath(root / split):
            raise InputError(
                f"data.validation {folder} holds the {purpose} images themselves",
                "Choices are made on images of their own: name another folder, or give a share such as 0.1.",
            )
    with _refusing_faults(folder):
        listing = {(VALIDATION, name): paths for name, paths in _list_classes(folder, folder)}
    own = {name for _, name in listing}
    for name in sorted(own.symmetric_difference(classes)):
        where = f"not in {TRAIN}" if name in own else f"in {TRAIN} but not there"
        raise InputError(f"data.validation {folder}: class {name!r} is {where}", VALIDATION_LAYOUT)
    for (_, name), paths in listing.items():
        _refuse_empty(f"{folder}/{name}", paths)
    return _source(listing, VALIDATION, classes, folder, _in_folder(folder))


def _test_folder(root: Path) -> str:
    """Return the name of the folder that `open_image_folder` takes the test images from."""
    return next((name for name in TEST_NAMES if (root / name).is_dir() and any(_folders(root / name, root))), "")


def _source(listing: Listing, split: str, classes: tuple[str, ...], root: Path, files: Files) -> PictureSource:
    paths = [path for name in classes for path in sorted(listing[split, name])]
    counts = torch.tensor([len(listing[split, name]) for name in classes])

    def name(index: int) -> str:
        return f"{root}/{paths[index]}"

    return PictureSource(
        torch.arange(len(classes)).repeat_interleave(counts),
        classes,
        lambda index: open_picture(files.read(paths[index]), name(index)),
        name,
        THREADS,
        lambda index: f"{paths[index]} {files.stamp(paths[index])}",
    )


def _refuse_uneven(listing: Listing, test: str, root: Path) -> None:
    for (split, name), paths in listing.items():
        if split not in (TRAIN, test):
            continue
        other = test if split == TRAIN else TRAIN
        if (other, name) not in listing:
            raise InputError(f"{root}: class {name!r} is in {split} but not in {other}", LAYOUT)
        _refuse_empty(f"{root}/{split}/{name}", paths)


def _refuse_empty(folder: str, paths: list[str]) -> None:
    if not paths:
        raise InputError(f"class folder {folder} holds no images", f"Allowed are {', '.join(sorted(SUFFIXES))}.")


def _list_folder(root: Path) -> tuple[Listing, Files]:
    with _refusing_faults(root):
        listing = {
            (split.name, name): [f"{split.name}/{path}" for path in paths]
            for split in _folders(root, root)
            if split.name in SPLITS
            for name, paths in _list_classes(split.path, root)
        }
    return listing, _in_folder(root)


def _list_classes(folder: Path | str, root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield every class of a folder under the root with the paths of its pictures, relative to the folder."""
    for label in _folders(folder, root):
        yield label.name, [f"{label.name}/{picture.name}" for picture in _pictures(label, root)]


@contextlib.contextmanager
def _refusing_faults(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or root} cannot be listed: {error.strerror}", "Check it.") from error


def _folders(folder: Path | str, root: Path) -> Iterator[os.DirEntry[str]]:
    for entry in _visible(folder, root):
        if entry.is_dir():
            yield entry


def _pictures(folder: os.DirEntry[str], root: Path) -> Iterator[os.DirEntry[str]]:
    for entry in _visible(folder.path, root):
        if not _is_picture(entry.name):
            continue
        if not entry.is_file():  # a pipe would wait for ever, a link may lead nowhere
            raise InputError(f"{entry.path} is not a regular file", "Remove it.")
        yield entry


def _visible(folder: Path | str, root: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # Unlike Path.resolve, realpath takes links that lead in a circle.
            if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(os.path.realpath(root)):
                raise InputError(f"{entry.path} is a symbolic link out of {root}", "Put the files themselves there.")
            yield entry


def _in_folder(root: Path) -> Files:
    def size(path: str) -> str:
        with _refusing_faults(root):
            return str(os.stat(root / path).st_size)

    return Files(lambda path: _read_file(root / path), size)


def _read_file(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size <= BYTE_LIMIT:
            return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "Restore the file or remove it.") from error
    raise InputError(f"{path} has {size} bytes; at most {BYTE_LIMIT} are read", "Remove it.")


def _list_archive(path: Path) -> tuple[Listing, Files]:
    archive = open_archive(path)
    entries = {entry_parts(entry): entry for entry in archive.infolist()}
    visible = [parts for parts in entries if parts and parts[0] != "__MACOSX" and not parts[-1].startswith(".")]
    tops = {parts[0] for parts in visible if len(parts) > 1}
    depth = 1 if len(tops) == 1 and TRAIN not in tops else 0  # one enclosing folder
    listing: Listing = {}
    for parts in visible:
        inner = parts[depth:]
        if len(inner) == 3 and inner[0] in SPLITS and _is_picture(inner[2]):
            listing.setdefault((inner[0], inner[1]), []).append("/".join(parts))
        elif len(inner) == 2 and inner[0] in SPLITS and entries[parts].is_dir():
            listing.setdefault((inner[0], inner[1]), [])

    def entry(path: str) -> ZipInfo:
        return entries[tuple(path.split("/"))]

    return listing, Files(
        lambda path: read_entry(archive, entry(path), BYTE_LIMIT),
        lambda path: f"{entry(path).file_size} {entry(path).CRC}",
    )


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES
