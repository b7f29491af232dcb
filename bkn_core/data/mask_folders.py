"""Images and masks in folders: ROOT/{train, val, test}/{images, masks}/NAME.*, on disk or in a zip file."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bkn_core.data.arrays import ARRAY_FAULTS
from bkn_core.data.mask_sets import IGNORED, MOST_CLASSES
from bkn_core.data.pictures import PICTURE_FAULTS, Color, decode, is_grey, is_picture, open_picture
from bkn_core.data.sources import composed
from bkn_core.data.trees import Tree, beneath, open_tree
from bkn_core.errors import InputError, located

LAYOUT = (
    "Expected ROOT/train/images/NAME.png (or jpg ...) with ROOT/train/masks/NAME.png (or npy) of class numbers, the "
    "same under test and, if wanted, val, and ROOT/classes.txt with a name a line; ROOT may be a .zip."
)
_GREY, _DEEP = ("L", "P", "1"), ("I;16", "I;16B", "I;16L", "I")  # modes whose values are class numbers


class Pairs(NamedTuple):
    """The images and masks of one split, and their names."""

    pictures: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
    names: tuple[str, ...]


def open_mask_folder(root: Path, color: Color | None, splits: tuple[str, ...]) -> tuple[dict[str, Pairs], list[str]]:
    """Read the splits that there are, in one colour, and the names of the classes, none where the root has no list.

    Raises:
        InputError: naming the pair that lacks a side, differs in size, or cannot be read.
    """
    if not os.path.exists(root):
        raise InputError(f"data.root {located(root)} does not exist", LAYOUT)
    tree = open_tree(root)
    top, entries = "", dict(tree.entries(""))
    while "train" not in entries and len(entries) == 1 and all(entries.values()):  # one enclosing folder
        top = beneath(top, next(iter(entries)))
        entries = dict(tree.entries(top))
    listed = {split: _listed(tree, beneath(top, split)) for split in splits if entries.get(split)}
    for split in ("train", "test"):
        if split in splits and not listed.get(split):
            raise InputError(f"data.root {located(root)} has no folder {split}/images with pictures", LAYOUT)
    color = color or _color(tree, [image for pairs in listed.values() for image, _ in pairs.values()])
    names = tree.read(beneath(top, "classes.txt")).decode(errors="replace") if "classes.txt" in entries else ""
    classes = [composed(line.strip()) for line in names.splitlines() if line.strip()]
    return {split: _read(tree, pairs, color) for split, pairs in listed.items()}, classes


def _listed(tree: Tree, folder: str) -> dict[str, tuple[str, str]]:
    """Return the paths of image and mask of each name."""
    sides: list[dict[str, str]] = []
    inner = dict(tree.entries(folder))
    for side in ("images", "masks"):
        if not inner.get(side):
            raise InputError(f"{tree.root}/{folder} has no folder {side}", LAYOUT)
        place = beneath(folder, side)
        paths: dict[str, str] = {}
        for name, is_folder in tree.entries(place):
            stem, suffix = os.path.splitext(name)
            if is_folder or not (is_picture(name) or (side == "masks" and suffix.lower() == ".npy")):
                continue
            if stem in paths:
                raise InputError(f"{tree.root}/{place} has {name} and {os.path.basename(paths[stem])}", "Keep one.")
            paths[stem] = beneath(place, name)
        sides.append(paths)
    images, masks = sides
    for stem in sorted(images.keys() ^ masks.keys()):
        missing, path = ("mask", images[stem]) if stem in images else ("image", masks[stem])
        raise InputError(f"{tree.root}/{path} has no {missing}: there is no {folder}/{missing}s/{stem}.*", LAYOUT)
    return {stem: (images[stem], masks[stem]) for stem in sorted(images)}


def _color(tree: Tree, paths: list[str]) -> Color:
    return "L" if all(is_grey(open_picture(tree.read(path), f"{tree.root}/{path}")) for path in paths) else "RGB"


def _read(tree: Tree, pairs: dict[str, tuple[str, str]], color: Color) -> Pairs:
    pictures, masks, names = [], [], []
    for image, mask in pairs.values():
        name = f"{tree.root}/{image}"
        pictures.append(decode(open_picture(tree.read(image), name), color, name))
        masks.append(read_mask(tree.read(mask), f"{tree.root}/{mask}"))
        check_pair(pictures[-1], masks[-1], name, f"{tree.root}/{mask}")
        names.append(name)
    return Pairs(tuple(pictures), tuple(masks), tuple(names))


def check_pair(image: Tensor, mask: Tensor, name: str, mask_name: str) -> None:
    """Refuse a mask of another size than its image.

    Raises:
        InputError: naming both.
    """
    if image.shape[1:] != mask.shape:
        sizes = (f"{height} x {width}" for height, width in (mask.shape, image.shape[1:]))
        raise InputError(
            f"{mask_name} is {next(sizes)}, but {name} is {next(sizes)}",
            "Give each image a mask of its own height and width.",
        )


def read_mask(data: bytes, name: str) -> Tensor:
    """Read class numbers, uint8 (H, W), from a grey or palette picture or an npy file.

    Raises:
        InputError: it is neither, is damaged, or holds a number that no class can have.
    """
    try:
        if name.lower().endswith(".npy"):
            values = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        else:
            values = _numbers(open_picture(data, name), name)
    except (*PICTURE_FAULTS, *ARRAY_FAULTS) as error:
        raise InputError(f"{name} cannot be read: {error}", "Write the mask again.") from error
    return checked_mask(values, name)


def checked_mask(values: np.ndarray, name: str) -> Tensor:
    """Return class numbers as uint8 (H, W).

    Raises:
        InputError: they are no plane of integers, or one is out of range.
    """
    if values.dtype.kind not in "iub" or values.ndim != 2 or not values.size:
        raise InputError(f"{name} is {values.dtype} {values.shape}", "A mask is a plane (H, W) of class numbers.")
    wrong = (values < 0) | ((values >= MOST_CLASSES) & (values != IGNORED))
    if wrong.any():
        raise InputError(
            f"{name} holds the number {values[wrong][0]}",
            f"Class numbers are 0 to {MOST_CLASSES - 1}; {IGNORED} is left out of loss and measures.",
        )
    return torch.from_numpy(values.astype(np.uint8))


def _numbers(picture: Image.Image, name: str) -> np.ndarray:
    if picture.mode not in (*_GREY, *_DEEP):
        raise InputError(
            f"{name} has the colour mode {picture.mode}, so its values are no class numbers",
            "Write it as a grey or palette PNG whose values are the classes, or as npy.",
        )
    return np.array(picture if picture.mode != "1" else picture.convert("1"))
