"""Images in folders, one per class: ROOT/{train, test}/CLASS/* or ROOT/CLASS/*, on disk or in a zip file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from bkn_core.data.pictures import SUFFIXES, is_picture, open_picture
from bkn_core.data.sources import Opened, PictureSource, Source, composed, hold_out
from bkn_core.data.trees import FolderTree, Tree, beneath, files_under, open_tree
from bkn_core.errors import InputError, located
from bkn_core.recipe_words import printable_path

TRAIN, TEST = "train", "test"
VALIDATION = ("val", "valid", "validation")
# A folder of such a name is no class.
SPLITS = (TRAIN, TEST, *VALIDATION)
NO_CLASSES = frozenset({*SPLITS, "training", "testing"})
THREADS = 2
HELD_OUT = 5  # one image in five is a test image where there is no folder of them
LAYOUT = (
    "Expected ROOT/train/CLASS/*.png (or jpg ...) and ROOT/test/CLASS/* or ROOT/val/CLASS/*, or ROOT/CLASS/*; "
    "ROOT may be a .zip."
)
VALIDATION_LAYOUT = "Expected FOLDER/CLASS/*.png (or jpg ...), with the classes of the training images."

# Paths of the pictures of each class.
Classes = dict[str, list[str]]
NAMED = 3  # files that a note names


class LeftOut(NamedTuple):
    """What lies among the data and is not read: folders by name, files that are no pictures, pictures of no class."""

    folders: list[str]
    files: list[str]
    loose: list[str]

    def notes(self, root: Path) -> tuple[str, ...]:
        """Say it, where there is anything."""
        suffixes = Counter(os.path.splitext(path)[1].lower() or "without a suffix" for path in self.files)
        formats = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())
        parts = [f"{formats} (no format that is read){_examples(self.files)}"] if self.files else []
        parts += [f"{len(self.loose)} pictures in no class folder{_examples(self.loose)}"] if self.loose else []
        folders = ", ".join(map(printable_path, self.folders))
        parts += [f"the folders {folders} (neither training nor test images)"] if self.folders else []
        return (f"{root}: left out are {'; '.join(parts)}",) if parts else ()


def _examples(paths: list[str]) -> str:
    """Name a few files, or all of those that are few."""
    few = ", ".join(map(printable_path, paths[:NAMED]))
    return f", such as {few}" if len(paths) > NAMED else f": {few}"


def open_image_folder(root: Path) -> Opened:
    """List the images of a folder or a zip file.

    A folder `val`, `valid` or `validation` beside `train` and `test` holds the validation images; without `test`, the
    test images. Where neither is there, or the root holds the classes themselves, a fixed fifth of the images of each
    class are the test images.

    Raises:
        InputError: A split or a class is missing or empty, or something under the root is not safe to read.
    """
    if not os.path.exists(root):
        moved = "bkn train --resume RUN data.root=PLACE"
        place = f"Name the place with data.root=PLACE, where the data of a run have moved too: {moved}."
        raise InputError(f"data.root {located(root)} does not exist", f"{place}\n{LAYOUT}")
    tree = open_tree(root)
    top, names = _enter(tree)
    splits = _splits(root, names)
    left_out = LeftOut([name for name in names if name not in splits.values()] if splits else [], [], [])
    if splits:
        left_out.loose.extend(_loose(tree, top))
    parts = {split: _classes(tree, beneath(top, name), left_out) for split, name in (splits or {TRAIN: ""}).items()}
    places = {split: root / top / splits.get(split, "") for split in parts}
    _refuse_uneven(parts, places, root)
    sources: dict[str, Source] = {split: _source(tree, classes) for split, classes in parts.items()}
    notes = left_out.notes(root)
    if TEST not in sources:
        sources[TRAIN], sources[TEST] = hold_out(sources[TRAIN], max(1, len(sources[TRAIN].labels) // HELD_OUT))
        notes += (_held_out(root, len(sources[TEST].labels), len(sources[TRAIN].labels)),)
    return Opened(sources[TRAIN], sources[TEST], sources.get(VALIDATION[0]), notes, places)


def open_validation_folder(folder: Path, taken: Mapping[str, Path], classes: tuple[str, ...]) -> Opened:
    """List the images of FOLDER/CLASS/*, which are to be others than those for training and testing.

    Args:
        folder: The folder.
        taken: The folders of the training and test images.
        classes: The classes of the training images.

    Raises:
        InputError: The folder is missing or the training or test folder itself, a class is missing, unknown or empty,
            or something under it is not safe to read.
    """
    if not os.path.isdir(folder):
        raise InputError(f"data.validation {located(folder)} is no folder", VALIDATION_LAYOUT)
    for split, purpose in ((TRAIN, "training"), (TEST, "test")):
        if split in taken and os.path.realpath(folder) == os.path.realpath(taken[split]):
            raise InputError(
                f"data.validation {folder} holds the {purpose} images themselves",
                "Choices are made on images of their own: name another folder, or give a share such as 0.1.",
            )
    tree, left_out = FolderTree(folder), LeftOut([], [], [])
    found = _classes(tree, "", left_out)
    for name in sorted(set(found).symmetric_difference(classes)):
        where = f"not in {TRAIN}" if name in found else f"in {TRAIN} but not there"
        raise InputError(f"data.validation {folder}: class {name!r} is {where}", VALIDATION_LAYOUT)
    _refuse_empty(folder, found)
    source = _source(tree, found)
    return Opened(source, source, source, left_out.notes(folder))


def _enter(tree: Tree) -> tuple[str, list[str]]:
    """Return the folder that holds splits or classes, which one enclosing folder may surround, and their names."""
    top = ""
    while True:
        names = [name for name, is_folder in tree.entries(top) if is_folder]
        if len(names) != 1 or names[0].lower() in NO_CLASSES:
            return top, names
        inner = beneath(top, names[0])
        if not any(is_folder for _, is_folder in tree.entries(inner)):
            return top, names
        top = inner


def _splits(root: Path, names: list[str]) -> dict[str, str]:
    """Return the folder of each split, none where the folders are classes."""
    found: dict[str, str] = {}
    for name in names:
        split = VALIDATION[0] if name.lower() in VALIDATION else name.lower()
        if split in found:
            raise InputError(f"data.root {root} has both {found[split]} and {name}", "Keep one of them.")
        if split in (TRAIN, TEST, VALIDATION[0]):
            found[split] = name
    if TRAIN not in found and any(name.lower() in NO_CLASSES for name in names):
        raise InputError(f"data.root {root} has no {TRAIN} folder, but {', '.join(names)}", LAYOUT)
    if TEST not in found and VALIDATION[0] in found:
        found[TEST] = found.pop(VALIDATION[0])
    return found


def _classes(tree: Tree, folder: str, left_out: LeftOut) -> Classes:
    """Return the pictures of each class of a folder, at any depth, and list the files that are none."""
    classes: Classes = {}
    left_out.loose.extend(_loose(tree, folder))
    for name in (name for name, is_folder in tree.entries(folder) if is_folder):
        pictures = classes.setdefault(composed(name), [])
        for path in files_under(tree, beneath(folder, name)):
            (pictures if is_picture(path) else left_out.files).append(path)
    return classes


def _loose(tree: Tree, folder: str) -> list[str]:
    return [beneath(folder, name) for name, is_folder in tree.entries(folder) if not is_folder and is_picture(name)]


def _source(tree: Tree, listing: Classes) -> PictureSource:
    classes = tuple(sorted(listing))
    paths = [path for name in classes for path in sorted(listing[name], key=lambda path: (composed(path), path))]
    counts = torch.tensor([len(listing[name]) for name in classes], dtype=torch.int64)

    def name(index: int) -> str:
        return f"{tree.root}/{paths[index]}"

    return PictureSource(
        torch.arange(len(classes)).repeat_interleave(counts),
        classes,
        lambda index: open_picture(tree.read(paths[index]), name(index)),
        name,
        THREADS,
        lambda index: f"{composed(paths[index])} {tree.stamp(paths[index])}",
    )


def _refuse_uneven(parts: dict[str, Classes], places: dict[str, Path], root: Path) -> None:
    train = parts[TRAIN]
    if len(train) < 2:
        raise InputError(f"{places[TRAIN]} has {len(train) or 'no'} class folder; there are to be two or more", LAYOUT)
    for split, classes in parts.items():
        for name in sorted(set(classes).symmetric_difference(train), key=lambda name: (name in classes, name)):
            here, there = (split, TRAIN) if name in classes else (TRAIN, split)
            raise InputError(
                f"{root}: class {name!r} is in {places[here].name} but not in {places[there].name}", LAYOUT
            )
        _refuse_empty(places[split], classes)


def _refuse_empty(folder: Path, classes: Classes) -> None:
    for name, paths in classes.items():
        if not paths:
            raise InputError(
                f"class folder {folder}/{name} holds no images", f"Allowed are {', '.join(sorted(SUFFIXES))}."
            )


def _held_out(root: Path, test: int, train: int) -> str:
    return (
        f"{root} has no folder of test images: {test} of its {train + test} images, in proportion to the classes and "
        "always the same, are held out for it"
    )
