"""Labelled images that are not decoded yet, and the fixed choice of some of them."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bkn_core.data.pictures import CHANNELS, Color, Fit, decode, is_grey, recolor, resize

ARRAY_CHUNK = 1024
PICTURE_CHUNK = 16
_COMPARED = 32  # pictures whose sizes are looked at
# Decoded pictures that are resized together take no more than this, or are one: two threads hold twice that.
STACK_BYTES = 2**24


class Source(Protocol):
    """Images whose labels are known and whose pixels are read on demand."""

    @property
    def labels(self) -> Tensor:
        """Class of each image, int64 (N,)."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class."""

    def take(self, indices: Tensor) -> Source:
        """Return the source of these images only."""

    def color(self) -> Color:
        """Return the natural colour: "L" where every image is grey."""

    def size(self) -> tuple[int, int]:
        """Return height and width of the first image."""

    def names(self) -> tuple[str, ...]:
        """Return the name of each image, such as its file; none where they lie in one array."""

    def read(self, indices: Tensor, color: Color, image_size: tuple[int, int], fit: Fit = "stretch") -> Tensor:
        """Return these images as uint8 (n, C, H, W)."""

    def digest(self) -> str:
        """Return a digest of what is known of the images without decoding them."""


@dataclass(frozen=True)
class ArraySource:
    """Images held as one uint8 array (N, C, H, W), C = 1 or 3."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def take(self, indices: Tensor) -> ArraySource:
        return ArraySource(self.images[indices], self.labels[indices], self.classes)

    def color(self) -> Color:
        return "L" if self.images.shape[1] == 1 else "RGB"

    def size(self) -> tuple[int, int]:
        height, width = self.images.shape[2:]
        return height, width

    def names(self) -> tuple[str, ...]:
        return ()

    def read(self, indices: Tensor, color: Color, image_size: tuple[int, int], fit: Fit = "stretch") -> Tensor:
        images = torch.empty((len(indices), CHANNELS[color], *image_size), dtype=torch.uint8)
        for chunk, wanted in zip(torch.split(images, ARRAY_CHUNK), torch.split(indices, ARRAY_CHUNK), strict=True):
            chunk.copy_(resize(recolor(self.images[wanted], color), image_size, fit))
        return images

    def digest(self) -> str:
        return tensor_digest(self.images)


@dataclass(frozen=True)
class PictureSource:
    """Images that are decoded one by one.

    Args:
        labels: Class of each image, int64 (N,).
        classes: Name of each class.
        open_picture: Opens image i, or raises an InputError that names it.
        name: Name of image i for error messages.
        threads: Images decoded at once; Pillow releases the interpreter lock.
        stamp: What tells image i from others without decoding it, wherever the data lies: its path and size.
    """

    labels: Tensor
    classes: tuple[str, ...]
    open_picture: Callable[[int], Image.Image]
    name: Callable[[int], str]
    threads: int
    stamp: Callable[[int], str] = lambda index: ""

    def take(self, indices: Tensor) -> PictureSource:
        kept = indices.tolist()
        return PictureSource(
            self.labels[indices],
            self.classes,
            lambda index: self.open_picture(kept[index]),
            lambda index: self.name(kept[index]),
            self.threads,
            lambda index: self.stamp(kept[index]),
        )

    def color(self) -> Color:
        # Ends at the first colour image: only a wholly grey folder has all its headers read.
        return "L" if all(is_grey(self.open_picture(index)) for index in range(len(self.labels))) else "RGB"

    def size(self) -> tuple[int, int]:
        height, width = decode(self.open_picture(0), "L", self.name(0)).shape[1:]  # upright, whatever the header says
        return height, width

    def has_several_sizes(self) -> bool:
        """Whether pictures differ in size, by the headers of up to 32 of them."""
        step = -(-len(self.labels) // _COMPARED)
        return len({self.open_picture(index).size for index in range(0, len(self.labels), step)}) > 1

    def names(self) -> tuple[str, ...]:
        return tuple(map(self.name, range(len(self.labels))))

    def read(self, indices: Tensor, color: Color, image_size: tuple[int, int], fit: Fit = "stretch") -> Tensor:
        images = torch.empty((len(indices), CHANNELS[color], *image_size), dtype=torch.uint8)

        def fill(chunk: Tensor, wanted: Tensor) -> None:
            pictures = (decode(self.open_picture(i), color, self.name(i)) for i in wanted.tolist())
            start = 0
            for stack in _stacks(pictures):
                resized = resize(stack, image_size, fit)
                chunk[start : start + len(resized)] = resized
                start += len(resized)

        with ThreadPoolExecutor(self.threads) as pool:
            # Leaving this loop by an error cancels the chunks that have not begun.
            for _ in pool.map(fill, torch.split(images, PICTURE_CHUNK), torch.split(indices, PICTURE_CHUNK)):
                pass
        return images

    def digest(self) -> str:
        total = hashlib.sha256()
        for index in range(len(self.labels)):
            total.update(f"{self.stamp(index)}\n".encode(errors="surrogateescape"))
        return total.hexdigest()


class Opened(NamedTuple):
    """Data that were opened.

    Args:
        train: Training images.
        test: Test images.
        validation: Those that the data themselves set apart for choices.
        notes: What the user should know of them.
        places: The folders of the training and test images, where they have some.
    """

    train: Source
    test: Source
    validation: Source | None = None
    notes: tuple[str, ...] = ()
    places: Mapping[str, Path] = MappingProxyType({})


def composed(name: str) -> str:
    """Return the one spelling of the name of a class or file: macOS writes é as two characters, others as one."""
    return unicodedata.normalize("NFC", name)


def tensor_digest(tensor: Tensor) -> str:
    """Return a digest of a tensor's shape and content."""
    total = hashlib.sha256(str(tuple(tensor.shape)).encode())
    for chunk in torch.split(tensor, ARRAY_CHUNK):
        total.update(chunk.numpy().tobytes())
    return total.hexdigest()


def _stacks(pictures: Iterable[Tensor]) -> Iterator[Tensor]:
    """Put neighbours of one size together: resizing small images takes a tenth of the time so."""
    for shape, group in groupby(pictures, key=lambda pixels: pixels.shape):
        together = max(1, STACK_BYTES // shape.numel())
        while stack := list(islice(group, together)):
            yield torch.stack(stack) if len(stack) > 1 else stack[0].unsqueeze(0)


def choose(labels: Tensor, count: int, *, proportional: bool = False) -> Tensor:
    """Choose `count` images spread over the classes; always the same ones, and smaller choices lie in larger ones.

    Args:
        labels: Class of each image, int64 (N,).
        count: How many to choose, at most N.
        proportional: In proportion to the sizes of the classes, instead of equally many of each as far as they go.

    Returns:
        Ascending indices, int64 (count,).
    """
    # NumPy has frozen the stream of RandomState: the choice outlives every version.
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))
    order = order[labels[order].argsort(stable=True)]
    sizes = labels.bincount()
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[order]]
    place = (rank.double() + 0.5) / sizes[labels[order]] if proportional else rank
    return order[place.argsort(stable=True)[:count]].sort().values


def hold_out(source: Source, count: int) -> tuple[Source, Source]:
    """Split a source into the images to train on and those held out, a fixed choice in proportion to the classes."""
    held_out = choose(source.labels, count, proportional=True)
    kept = torch.ones(len(source.labels), dtype=torch.bool)
    kept[held_out] = False
    return source.take(kept.nonzero().flatten()), source.take(held_out)
