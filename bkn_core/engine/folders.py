"""Images in folders, one per class: ROOT/{train, test or val}/CLASS/*, on disk or in a zip file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bkn_core.engine.archives import entry_parts, open_archive, read_entry
from bkn_core.engine.pictures import BYTE_LIMIT, SUFFIXES, open_picture
from bkn_core.engine.sources import PictureSource
from bkn_core.errors import InputError

TRAIN = "train"
TEST_NAMES = ("test", "val")
SPLITS = (TRAIN, *TEST_NAMES)
THREADS = 2
LAYOUT = "Expected ROOT/train/CLASS/*.png (or jpg ...) and ROOT/test/CLASS/* or ROOT/val/CLASS/*; ROOT may be a .zip."

# Paths of the pictures, relative to the root, of each (split, class).
Listing = dict[tuple[str, str], list[str]]


def open_image_folder(root: Path) -> tuple[PictureSource, PictureSource]:
    """List the training and test images of a folder or a zip file; where both exist, `test` goes before `val`.

    Raises:
        InputError: A split or a class is missing or empty, or something under the root is not safe to read.
    """
    if not root.exists():
        raise InputError(f"data.root {root} does not exist", LAYOUT)
    listing, read = _list_folder(root) if root.is_dir() else _list_archive(root)
    splits = {split for split, _ in listing}
    test = next((name for name in TEST_NAMES if name in splits), None)
    if TRAIN not in splits or test is None:
        raise InputError(f"data.root {root} has no {' or '.join(TEST_NAMES) if test is None else TRAIN} folder", LAYOUT)
    classes = tuple(sorted(name for split, name in listing if split == TRAIN))
    _refuse_uneven(listing, test, root)
    return _source(listing, TRAIN, classes, root, read), _source(listing, test, classes, root, read)


def _source(
    listing: Listing, split: str, classes: tuple[str, ...], root: Path, read: Callable[[str], bytes]
) -> PictureSource:
    paths = [path for name in classes for path in sorted(listing[split, name])]
    counts = torch.tensor([len(listing[split, name]) for name in classes])

    def name(index: int) -> str:
        return f"{root}/{paths[index]}"

    return PictureSource(
        torch.arange(len(classes)).repeat_interleave(counts),
        classes,
        lambda index: open_picture(read(paths[index]), name(index)),
        name,
        THREADS,
    )


def _refuse_uneven(listing: Listing, test: str, root: Path) -> None:
    for (split, name), paths in listing.items():
        if split not in (TRAIN, test):
            continue
        other = test if split == TRAIN else TRAIN
        if (other, name) not in listing:
            raise InputError(f"{root}: class {name!r} is in {split} but not in {other}", LAYOUT)
        if not paths:
            raise InputError(
                f"class folder {root}/{split}/{name} holds no images", f"Allowed are {', '.join(sorted(SUFFIXES))}."
            )


def _list_folder(root: Path) -> tuple[Listing, Callable[[str], bytes]]:
    try:
        listing = {
            (split.name, label.name): [
                f"{split.name}/{label.name}/{picture.name}" for picture in _pictures(label, root)
            ]
            for split in _folders(root, root)
            if split.name in SPLITS
            for label in _folders(split.path, root)
        }
    except OSError as error:
        raise InputError(f"{error.filename or root} cannot be listed: {error.strerror}", "Check it.") from error
    return listing, lambda path: _read_file(root / path)


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
            if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root.resolve()):
                raise InputError(f"{entry.path} is a symbolic link out of {root}", "Put the files themselves there.")
            yield entry


def _read_file(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size <= BYTE_LIMIT:
            return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "Restore the file or remove it.") from error
    raise InputError(f"{path} has {size} bytes; at most {BYTE_LIMIT} are read", "Remove it.")


def _list_archive(path: Path) -> tuple[Listing, Callable[[str], bytes]]:
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
    return listing, lambda name: read_entry(archive, entries[tuple(name.split("/"))], BYTE_LIMIT)


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES
