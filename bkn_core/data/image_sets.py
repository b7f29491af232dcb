"""Labelled images, held decoded or decoded batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bkn_core.data.pictures import Color, Fit
from bkn_core.data.sources import Source


@dataclass(frozen=True)
class ImageSet:
    """Images held decoded: uint8 (N, C, H, W), labels int64 (N,), and names where they are files."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, indices: Tensor) -> Tensor:
        """Return the images at these indices, uint8 (n, C, H, W)."""
        return self.batch(indices)[0]

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images, uint8 (n, C, H, W), and the labels at these indices, int64 (n,)."""
        return self.images.index_select(0, indices), self.labels.index_select(0, indices)


@dataclass(frozen=True)
class LazyImageSet:
    """Images too many for memory: each batch is decoded by the threads of its source when it is asked for."""

    source: Source
    color: Color
    image_size: tuple[int, int]
    fit: Fit = "stretch"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labels(self) -> Tensor:
        """Class of each image, int64 (N,)."""
        return self.source.labels

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class."""
        return self.source.classes

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each image, where it is a file."""
        return self.source.names()

    def sample(self, indices: Tensor) -> Tensor:
        """Return the images at these indices, uint8 (n, C, H, W)."""
        return self.batch(indices)[0]

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images, uint8 (n, C, H, W), and the labels at these indices, int64 (n,).

        Raises:
            InputError: A file cannot be read.
        """
        return self.source.read(indices, self.color, self.image_size, self.fit), self.labels.index_select(0, indices)
