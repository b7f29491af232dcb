"""Images with masks by the name of their data set, as training and measuring take them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bkn_core.data.archives import open_archive
from bkn_core.data.arrays import read_array
from bkn_core.data.mask_folders import Pairs, check_pair, checked_mask, open_mask_folder
from bkn_core.data.mask_sets import IGNORED, MaskSet
from bkn_core.data.pictures import Color, recolor
from bkn_core.data.preprocess import Preprocess, channel_statistics
from bkn_core.data.scenes import CLASSES, open_scenes
from bkn_core.data.sources import choose
from bkn_core.data.splits import DataSplits
from bkn_core.errors import InputError, RecipeError
from bkn_core.recipe_sections import MASK_DATA

_ARRAYS = "Expected *_images, uint8 (N, H, W) or (N, H, W, 3), and *_masks, integers (N, H, W), of train and test."
_SPLITS = ("train", "test", "val")


class _Read(NamedTuple):
    parts: dict[str, Pairs]
    classes: list[str]


def load_masks(
    name: str,
    *,
    root: str | Path,
    image_size: int | tuple[int, int] | None,
    train_images: int | None = None,
    test_images: int | None = None,
    validation: float | str | None = None,
    color: Color | None = None,
) -> DataSplits:
    """Load images with masks; mean and std of `preprocess` are those of the chosen training images.

    Args:
        name: `scenes` or `maskfolder`.
        root: folder, .zip or .npz file; not used by `scenes`.
        image_size: what training cuts out; None takes the size of the first training image.
        train_images: how many training images, a fixed choice; None takes all.
        test_images: the same for test images.
        validation: a share of the training images that is held out; None takes what the data set apart.
        color: "RGB" or "L"; None takes the natural one.

    Raises:
        RecipeError: there is no such data set, or it has fewer images than asked for.
        InputError: a pair is missing, damaged or does not fit.
    """
    if isinstance(validation, str):
        raise RecipeError(f"data.validation is {validation!r}, a folder", f"{name} takes a share, such as 0.1, or val.")
    read = _open(name, Path(root).expanduser(), color, _SPLITS)
    first = read.parts["train"].masks[0].shape
    size = (image_size, image_size) if isinstance(image_size, int) else image_size or (first[0], first[1])
    classes = _classes(read, name)
    sets = {
        split: MaskSet(pairs.pictures, pairs.masks, classes, pairs.names, size) for split, pairs in read.parts.items()
    }
    train, held_out = sets["train"], sets.get("val")
    if validation is not None:
        if not 1 <= round(validation * len(train)) < len(train):
            raise RecipeError(f"data.validation is {validation}: of {len(train)} images that leaves one side empty")
        apart = choose(train.labels, round(validation * len(train)))
        kept = torch.ones(len(train), dtype=torch.bool)
        kept[apart] = False
        train, held_out = train.take(kept.nonzero().flatten()), train.take(apart)
    train = _some(train, train_images, f"{name} has {len(train)} training images", "data.train_images")
    test = _some(sets["test"], test_images, f"{name} has {len(sets['test'])} test images", "data.test_images")
    mean, std = channel_statistics(torch.cat([p.flatten(1) for p in train.pictures], 1)[None, :, :, None])
    return DataSplits(train, test, Preprocess(_color(train), size, mean, std), classes, held_out)


def load_test_masks(
    name: str, *, root: str | Path, preprocess: Preprocess, classes: tuple[str, ...], test_images: int | None = None
) -> MaskSet:
    """Load the test images alone, in the colour and with the classes of a trained model.

    Raises:
        InputError, RecipeError: as `load_masks`.
    """
    read = _open(name, Path(root).expanduser(), preprocess.color, ("test",))
    if not read.classes:
        read = _Read(read.parts, list(classes))
    pairs = read.parts["test"]
    test = MaskSet(pairs.pictures, pairs.masks, _classes(read, name), pairs.names, preprocess.image_size)
    return _some(test, test_images, f"{name} has {len(test)} test images", "data.test_images")


def _open(name: str, root: Path, color: Color | None, splits: tuple[str, ...]) -> _Read:
    if name == "scenes":
        parts = dict(zip(_SPLITS, open_scenes(), strict=False))
        found = {split: _pairs(parts[split]) for split in splits if split in parts}
        if color == "L":
            found = {split: _grey(pairs) for split, pairs in found.items()}
        return _Read(found, list(CLASSES))
    if name != "maskfolder":
        raise RecipeError(
            f"data.name is '{name}', which has no masks, but task is segmentation; choose one of {', '.join(MASK_DATA)}"
        )
    if root.suffix.lower() == ".npz":
        return _open_arrays(root, color, splits)
    return _Read(*open_mask_folder(root, color, splits))


def _open_arrays(path: Path, color: Color | None, splits: tuple[str, ...]) -> _Read:
    """Read {train,test,val}_images, uint8 (N, H, W[, 3]), and *_masks, (N, H, W), of a .npz file."""
    parts: dict[str, Pairs] = {}
    with open_archive(path) as archive:
        held = {entry.removesuffix(".npy") for entry in archive.namelist()}
        for split in (split for split in splits if split != "val" or "val_images" in held):
            images, masks = (read_array(archive, f"{split}_{side}") for side in ("images", "masks"))
            where = f"{path}: {split}_images"
            if images.dtype != np.uint8 or images.shape[3:] not in ((), (1,), (3,)) or images.ndim < 3:
                raise InputError(f"{where} is {images.dtype} {images.shape}", _ARRAYS)
            if len(images) != len(masks) or not len(images):
                raise InputError(f"{where} has {len(images)} images, {split}_masks has {len(masks)}", _ARRAYS)
            pixels = torch.from_numpy(images.reshape(*images.shape[:3], -1)).permute(0, 3, 1, 2)
            pictures = tuple(recolor(pixels, color or ("L" if pixels.shape[1] == 1 else "RGB")).unbind())
            checked = tuple(checked_mask(mask, f"{path}: {split}_masks[{i}]") for i, mask in enumerate(masks))
            for i, pair in enumerate(zip(pictures, checked, strict=True)):
                check_pair(*pair, f"{where}[{i}]", f"{split}_masks[{i}]")
            parts[split] = Pairs(pictures, checked, ())
        names = [str(name) for name in read_array(archive, "classes").ravel()] if "classes" in held else []
    return _Read(parts, names)


def _pairs(found: tuple[tuple[Tensor, Tensor], ...]) -> Pairs:
    pictures, masks = zip(*found, strict=True)
    return Pairs(pictures, masks, ())


def _grey(pairs: Pairs) -> Pairs:
    return pairs._replace(pictures=tuple(recolor(torch.stack(pairs.pictures), "L").unbind()))


def _classes(read: _Read, name: str) -> tuple[str, ...]:
    """Return the names of the classes, after a look at every mask for a number that has none."""
    largest = {split: [_largest(mask) for mask in pairs.masks] for split, pairs in read.parts.items()}
    classes = read.classes or [str(number) for number in range(max(largest["train"]) + 1)]
    if len(classes) < 2:
        raise InputError(f"{name} has {len(classes)} class; there are to be two or more", "Look at the masks.")
    for split, numbers in largest.items():
        for i, number in enumerate(numbers):
            if number >= len(classes):
                names = read.parts[split].names
                raise InputError(
                    f"the mask of {names[i] if names else f'{split} image {i}'} holds the number {number}, but there "
                    f"are {len(classes)} classes",
                    f"Class numbers are 0 to {len(classes) - 1}, and {IGNORED} for what is left out; name all classes "
                    "in classes.txt.",
                )
    return tuple(classes)


def _largest(mask: Tensor) -> int:
    known = mask[mask != IGNORED]
    return int(known.max()) if len(known) else 0


def _color(images: MaskSet) -> Color:
    return "L" if images.pictures[0].shape[0] == 1 else "RGB"


def _some(images: MaskSet, count: int | None, has: str, key: str) -> MaskSet:
    if count is None or count == len(images):
        return images
    if count > len(images):
        raise RecipeError(f"{key} is {count}, but {has}", f"Choose 1 to {len(images)}, or null for all.")
    return images.take(choose(images.labels, count))
