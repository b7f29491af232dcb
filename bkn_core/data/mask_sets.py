"""Images with a mask each, held decoded: they may differ in size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = 255
"""What a mask says of pixels that nothing is asked of."""
OUTSIDE = 254
"""What the mask of a smaller image says beside it in a batch."""
MOST_CLASSES = 254


@dataclass(frozen=True)
class MaskSet:
    """Images and masks of class numbers.

    Args:
        pictures: uint8 (C, H, W) each.
        masks: uint8 (H, W) each, of class numbers or `IGNORED`.
        classes: name of each class.
        names: name of each image, where it is a file.
        image_size: height and width that training cuts out.
    """

    pictures: tuple[Tensor, ...] = field(repr=False)
    masks: tuple[Tensor, ...] = field(repr=False)
    classes: tuple[str, ...]
    names: tuple[str, ...]
    image_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def labels(self) -> Tensor:
        """One stratum for all images, where some of them are chosen: a mask has no one class, int64 (N,)."""
        return torch.zeros(len(self), dtype=torch.int64)

    @property
    def pixels(self) -> Tensor:
        """How many pixels of all masks each class has, int64 (classes,)."""
        counts = sum(mask.flatten().bincount(minlength=256)[: len(self.classes)] for mask in self.masks)
        return torch.as_tensor(counts)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images, uint8 (n, C, H, W), and masks, int64 (n, H, W), smaller ones with `OUTSIDE` beside."""
        chosen = [(self.pictures[i], self.masks[i]) for i in indices.tolist()]
        height, width = (max(mask.shape[axis] for _, mask in chosen) for axis in (0, 1))
        images, masks = zip(*(_padded(image, mask, height, width) for image, mask in chosen), strict=True)
        return torch.stack(images), torch.stack(masks).long()

    def sample(self, indices: Tensor) -> Tensor:
        """Return the middle of these images as training cuts it out, uint8 (n, C, H, W); what is missing is black."""
        return torch.stack([_middle(self.pictures[i], self.image_size) for i in indices.tolist()])

    def alike(self, together: int) -> Iterator[Tensor]:
        """Yield indices of neighbours of one size, at most so many at once."""
        start = 0
        for i in range(1, len(self) + 1):
            if i == len(self) or i - start == together or self.masks[i].shape != self.masks[start].shape:
                yield torch.arange(start, i)
                start = i

    def take(self, indices: Tensor) -> MaskSet:
        """Return the set of these images only."""
        kept = indices.tolist()
        pictures, masks = (tuple(part[i] for i in kept) for part in (self.pictures, self.masks))
        names = tuple(self.names[i] for i in kept) if self.names else ()
        return MaskSet(pictures, masks, self.classes, names, self.image_size)

    def digests(self) -> tuple[str, str]:
        """Return digests of the masks and of the pictures, shapes included."""
        return _digest(self.masks), _digest(self.pictures)


def inside(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return an image and its mask without what a batch put beside them."""
    held = mask != OUTSIDE
    height, width = int(held[:, 0].sum()), int(held[0].sum())
    return image[:, :height, :width], mask[:height, :width]


def _padded(image: Tensor, mask: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    beside = (0, width - mask.shape[1], 0, height - mask.shape[0])
    return F.pad(image, beside), F.pad(mask, beside, value=OUTSIDE)


def _middle(image: Tensor, size: tuple[int, int]) -> Tensor:
    for axis, wanted in zip((1, 2), size, strict=True):
        have = image.shape[axis]
        image = image.narrow(axis, max(0, have - wanted) // 2, min(have, wanted))
    return F.pad(image, (0, size[1] - image.shape[2], 0, size[0] - image.shape[1]))


def _digest(tensors: tuple[Tensor, ...]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(str(tuple(tensor.shape)).encode())
        total.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return total.hexdigest()
