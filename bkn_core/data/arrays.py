"""Data sets that are arrays: the digits of scikit-learn and .npz files."""

from __future__ import annotations

import os
import tokenize
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bkn_core.data.archives import ARCHIVE_FAULTS, open_archive
from bkn_core.data.sources import ArraySource, Source, composed, hold_out
from bkn_core.errors import InputError, located

DIGITS_TEST_IMAGES = 360
DIGITS_MAXIMUM = 16
ARRAY_LIMIT = 2**32
HEADER_LIMIT = 2**16
SPLITS = ("train", "test")
# NumPy reads the header of an array as Python text.
ARRAY_FAULTS = (*ARCHIVE_FAULTS, OverflowError, SyntaxError, TypeError, tokenize.TokenError)
LAYOUT = (
    "Expected arrays train_images, train_labels, test_images, test_labels (images uint8 (N, H, W) or (N, H, W, C), "
    "labels integers (N,)) and, if wanted, classes (names)."
)


def open_digits() -> tuple[Source, Source]:
    """Return the 1,797 scanned digits (8 x 8, grey) that scikit-learn ships, as 1,437 training and 360 test images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / DIGITS_MAXIMUM)).astype(np.uint8)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    source = ArraySource(torch.from_numpy(images).unsqueeze(1), labels, tuple(str(digit) for digit in range(10)))
    return hold_out(source, DIGITS_TEST_IMAGES)


def open_npz(path: Path) -> tuple[ArraySource, ArraySource]:
    """Read training and test images and labels from a .npz file; nothing in it is ever unpickled.

    Raises:
        InputError: The file or an array is missing, damaged, of a wrong type or shape, or a label is out of range.
    """
    if not os.path.isfile(path):
        raise InputError(f"data.root {located(path)} is not a .npz file", LAYOUT)
    with open_archive(path) as archive:
        images = {split: _images(archive, f"{split}_images") for split in SPLITS}
        labels = {split: _labels(archive, f"{split}_labels", len(images[split])) for split in SPLITS}
        classes = _classes(archive, labels["train"])
        sources = []
        for split in SPLITS:
            _check_range(labels[split], len(classes), f"{path}: {split}_labels")
            sources.append(ArraySource(images[split], torch.from_numpy(labels[split]), classes))
    return sources[0], sources[1]


def _images(archive: zipfile.ZipFile, name: str) -> torch.Tensor:
    array = read_array(archive, name)
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[3:] not in ((), (1,), (3,)):
        raise InputError(
            f"{archive.filename}: {name} is {array.dtype} {array.shape}; "
            "allowed is uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3)",
            LAYOUT,
        )
    if not array.size:
        raise InputError(f"{archive.filename}: {name} is empty, its shape is {array.shape}", LAYOUT)
    return torch.from_numpy(array.reshape(*array.shape[:3], -1)).permute(0, 3, 1, 2)


def _labels(archive: zipfile.ZipFile, name: str, images: int) -> npt.NDArray[np.int64]:
    array = read_array(archive, name, HEADER_LIMIT + images * 8)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise InputError(
            f"{archive.filename}: {name} is {array.dtype} {array.shape}; allowed is a row of integers", LAYOUT
        )
    if len(array) != images:
        split = name.removesuffix("_labels")
        has = f"{split}_images has {images} images but {name} {len(array)} labels"
        raise InputError(f"{archive.filename}: {has}", LAYOUT)
    return array.astype(np.int64)


def _classes(archive: zipfile.ZipFile, train_labels: npt.NDArray[np.int64]) -> tuple[str, ...]:
    if "classes.npy" in archive.namelist():
        names = [composed(str(name)) for name in read_array(archive, "classes").ravel()]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise InputError(
                f"{archive.filename}: classes holds {twice[0]!r} twice", "Give each class a name of its own."
            )
        return tuple(names)
    # There are no more classes than training images, whatever a stray label says.
    count = min(int(train_labels.max(initial=-1)) + 1, len(train_labels))
    return tuple(str(label) for label in range(count))


def _check_range(labels: npt.NDArray[np.int64], classes: int, name: str) -> None:
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        index = outside[0]
        raise InputError(
            f"{name}[{index}] is {labels[index]}; there are {classes} classes, so labels are 0 to {classes - 1}",
            "Number the classes from 0; without an array `classes` their number is the largest training label + 1.",
        )


def read_array(archive: zipfile.ZipFile, name: str, limit: int = ARRAY_LIMIT) -> npt.NDArray[np.generic]:
    """Read one array of an archive; nothing in it is unpickled.

    Raises:
        InputError: it is missing, damaged or claims more than `limit` bytes.
    """
    try:
        entry = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise InputError(f"{archive.filename} has no array {name}", LAYOUT) from None
    if entry.file_size > limit:
        raise InputError(
            f"{archive.filename}: {name} claims {entry.file_size} bytes; at most {limit} are read",
            "Keep larger data as an image folder; one label belongs to each image.",
        )
    try:
        with archive.open(entry) as file:
            array: npt.NDArray[np.generic] = np.lib.format.read_array(file, allow_pickle=False)
    except ARRAY_FAULTS as error:
        raise InputError(f"{archive.filename}: {name} is damaged: {error}", "Write the file again.") from error
    return array
