"""The classification data sets of torchvision, by the name of their class."""

from __future__ import annotations

import inspect
import pickle
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from bkn_core.data.pictures import PICTURE_FAULTS
from bkn_core.data.sources import ArraySource, PictureSource, Source, hold_out
from bkn_core.errors import InputError, located

# Named one by one: among the others are detection sets, and some (LSUN) unpickle whatever lies in their folder.
NAMES = (
    "Caltech101",
    "Caltech256",
    "CIFAR10",
    "CIFAR100",
    "Country211",
    "DTD",
    "EuroSAT",
    "FakeData",
    "FashionMNIST",
    "FER2013",
    "FGVCAircraft",
    "Flowers102",
    "Food101",
    "GTSRB",
    "ImageNet",
    "Imagenette",
    "KMNIST",
    "MNIST",
    "OxfordIIITPet",
    "PCAM",
    "Places365",
    "QMNIST",
    "RenderedSST2",
    "SEMEION",
    "StanfordCars",
    "STL10",
    "SUN397",
    "SVHN",
    "USPS",
)
SPLIT_NAMES = {
    "ImageNet": ("train", "val"),
    "Imagenette": ("train", "val"),
    "OxfordIIITPet": ("trainval", "test"),
    "Places365": ("train-standard", "val"),
}
# The folders that some data sets are unpacked into, which say what lies in them.
FOLDERS = {"cifar-10-batches-py": "CIFAR10", "cifar-100-python": "CIFAR100"}
HELD_OUT = 5  # one image in five is a test image where a data set has no test part
LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")
CLASS_ATTRIBUTES = ("classes", "categories")
BUILD_FAULTS = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    AssertionError,
    ImportError,
    pickle.UnpicklingError,
    zlib.error,
)


def unpacked(root: Path) -> tuple[str, Path] | None:
    """Return the name and the root of the data set that lies unpacked in a folder, or is it; None where neither is so.

    Raises:
        InputError: There are several.
    """
    found = {name: root for folder, name in FOLDERS.items() if (root / folder).is_dir()}
    if root.name in FOLDERS and root.is_dir():
        found = {FOLDERS[root.name]: root.parent}
    if len(found) > 1:
        raise InputError(f"data.root {located(root)} holds {' and '.join(found)}", "Name the folder of one of them.")
    return next(iter(found.items()), None)


def open_torchvision(name: str, root: Path, *, download: bool) -> tuple[Source, Source]:
    """Return the training and test images of a torchvision data set; the network is touched only for `download`.

    A data set without a test part has a fixed stratified fifth of its images held out.

    Raises:
        InputError: The files are not there, or cannot be read.
    """
    parameters = inspect.signature(getattr(datasets, name)).parameters
    if "train" in parameters:
        parts: Sequence[dict[str, object]] = ({"train": True}, {"train": False})
    elif "split" in parameters:
        parts = [{"split": split} for split in SPLIT_NAMES.get(name, ("train", "test"))]
    else:
        source = _source(name, _build(name, root, {}, download=download))
        _check_labels(name, source, source.classes)
        return hold_out(source, len(source.labels) // HELD_OUT)
    train, test = (_source(name, _build(name, root, part, download=download)) for part in parts)
    for source in (train, test):
        _check_labels(name, source, train.classes)
    return train, test


def _build(name: str, root: Path, part: dict[str, object], *, download: bool) -> Any:
    kind = getattr(datasets, name)
    accepted = inspect.signature(kind).parameters
    offered = {"root": str(root), "download": download, **part}
    try:
        return kind(**{key: value for key, value in offered.items() if key in accepted})
    except BUILD_FAULTS as error:
        hint = f"Put the files of {name} under {root} as torchvision lays them out"
        if "download" in accepted and not download:
            hint += ", or set data.download=true"
        raise InputError(f"{name} cannot be read from data.root {located(root)}: {error}", f"{hint}.") from error


def _source(name: str, dataset: Any) -> Source:
    labels = _labels(name, dataset)
    classes = _classes(dataset, labels)
    images = _array(dataset)
    if images is not None:
        return ArraySource(images, labels, classes)

    # One thread: torchvision promises no safety among threads, and FakeData reseeds torch's own generator.
    return PictureSource(
        labels, classes, lambda index: _item(name, dataset, index)[0], lambda index: _describe(name, index), threads=1
    )


def _item(name: str, dataset: Any, index: int) -> tuple[Image.Image, Any]:
    try:
        picture, label = dataset[index]
    except PICTURE_FAULTS as error:
        raise InputError(f"{_describe(name, index)} cannot be read: {error}", "Download the data again.") from error
    return picture, label


def _describe(name: str, index: int) -> str:
    return f"image {index} of {name}"


def _check_labels(name: str, source: Source, classes: Sequence[str]) -> None:
    largest = int(source.labels.max()) if len(source.labels) else 0
    if largest >= len(classes):
        raise InputError(f"{name} has a label {largest} but {len(classes)} classes", "Download the data again.")


def _labels(name: str, dataset: Any) -> Tensor:
    """Labels without decoding an image, where the data set lists them; else by reading it once."""
    candidates = [getattr(dataset, attribute, None) for attribute in LABEL_ATTRIBUTES]
    samples = getattr(dataset, "_samples", None)
    candidates.append([label for _, label in samples] if samples is not None else None)
    for candidate in candidates:
        if candidate is not None and np.shape(candidate) == (len(dataset),):
            labels = np.asarray(candidate)
            break
    else:
        labels = np.asarray([_item(name, dataset, index)[1] for index in range(len(dataset))])
    if labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise InputError(f"the files of {name} hold no class labels", "Use a version of them that has labels.")
    return torch.from_numpy(labels.astype(np.int64))


def _classes(dataset: Any, labels: Tensor) -> tuple[str, ...]:
    names = next((getattr(dataset, key) for key in CLASS_ATTRIBUTES if hasattr(dataset, key)), None)
    if names is None:
        return tuple(str(label) for label in range(len(labels.bincount())))
    # ImageNet gives several words for one class.
    return tuple(name if isinstance(name, str) else name[0] for name in names)


def _array(dataset: Any) -> Tensor | None:
    """All images at once (N, C, H, W), for the data sets that hold them so."""
    data = np.asarray(getattr(dataset, "data", ()))
    if data.dtype != np.uint8 or data.ndim not in (3, 4):
        return None
    if data.ndim == 3:
        data = data[:, None]
    elif data.shape[-1] == 3:
        data = data.transpose(0, 3, 1, 2)
    return torch.from_numpy(data)
