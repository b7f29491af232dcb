"""What happens to a batch: its place in the epoch, augmentation and normalization."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bkn_core.data.preprocess import Preprocess
from bkn_core.errors import RecipeError

AUGMENTATIONS = ("none", "flip", "crop_flip")
CROP_FRACTION = 8


def normalize(
    images: Tensor, preprocess: Preprocess, *, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """Turn images with values 0 to scale into a model's input: (x / scale - mean) / std, float32.

    Args:
        images: (N, C, H, W), uint8 or float.
        preprocess: Scale, and mean and std of each channel.
        memory_format: Layout of the result.
    """
    mean = _per_channel(preprocess.mean, images.device)
    std = _per_channel(preprocess.std, images.device)
    inputs = images.contiguous().to(torch.float32).div(preprocess.scale).sub_(mean).div_(std)
    if memory_format != torch.channels_last:
        return inputs.contiguous(memory_format=memory_format)
    # For three channels this is several times faster than `contiguous`, and so is arithmetic before it, not after.
    return torch.stack(inputs.unbind(1), -1).permute(0, 3, 1, 2)


def augment(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Flip and shift each image at random, all in one pass.

    Images are mirrored with probability one half; `crop_flip` also pads an eighth of the image size on each side and
    cuts out a window of the original size. As is usual with torchvision's `RandomCrop`, this comes before
    normalization, so the padding is black; on bytes it also moves a quarter of the memory.

    Args:
        images: (N, C, H, W), any dtype.
        kind: none, flip or crop_flip.
        generator: Source of every random choice.

    Raises:
        RecipeError: There is no such kind.
    """
    if kind not in AUGMENTATIONS:
        raise RecipeError(f"data.augment is '{kind}'; choose one of {', '.join(AUGMENTATIONS)}")
    if kind == "none":
        return images
    count, channels, height, width = images.shape
    pad_height, pad_width = (height // CROP_FRACTION, width // CROP_FRACTION) if kind == "crop_flip" else (0, 0)
    mirrored = _draw(2, count, generator, images.device) == 1
    rows = _draw(2 * pad_height + 1, count, generator, images.device) + torch.arange(height, device=images.device)
    columns = _draw(2 * pad_width + 1, count, generator, images.device) + torch.arange(width, device=images.device)
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = functional.pad(images, (pad_width, pad_width, pad_height, pad_height))
    # One gather over flattened pixels is the fastest of the vectorized forms on a CPU.
    pixels = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).flatten(1)[:, None].expand(-1, channels, -1)
    return padded.flatten(2).gather(2, pixels).view(count, channels, height, width)


def generator_at(seed: int, *position: int) -> torch.Generator:
    """Return a CPU generator that depends only on the seed and a position (epoch, batch, rank ...)."""
    state = np.random.SeedSequence(seed, spawn_key=position).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def epoch_order(images: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which an epoch goes through its images, int64 (images,).

    Stateless: a run that resumes anywhere finds the order of the run that never stopped.
    """
    return torch.randperm(images, generator=generator_at(seed, epoch))


@dataclass(frozen=True)
class BatchPlan:
    """Cuts an epoch into forward passes, the same number for every process.

    Pass i takes the next per_device * world_size images of the order; process r has the r-th slice of per_device. So
    the processes together see what one process with the joint batch would, statistics groups included. Every image is
    used exactly once: the last pass takes what is left, filling the processes in order of their rank, so the last
    optimizer step may hold fewer images and the batch of the last processes may be short or empty.

    Args:
        images: Images in the epoch.
        per_device: Images in one forward pass of one process.
        rank: This process.
        world_size: Number of processes.
    """

    images: int
    per_device: int
    rank: int = 0
    world_size: int = 1

    @property
    def joint(self) -> int:
        """Images of all processes in one full pass."""
        return self.per_device * self.world_size

    def __len__(self) -> int:
        return -(-self.images // self.joint)

    def joint_images(self, index: int) -> int:
        """Return how many images all processes together have in pass `index`."""
        return min(self.joint, self.images - index * self.joint)

    def batch(self, order: Tensor, index: int) -> Tensor:
        """Return the part of the order that this process takes in pass `index`."""
        start = index * self.joint + self.rank * self.per_device
        return order[start : start + self.per_device]


def _draw(below: int, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    drawn = torch.randint(below, (count, 1), generator=generator, device=generator.device)
    return drawn.to(device, non_blocking=True)


@lru_cache(maxsize=16)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Kept, because a copy to a GPU at every step would wait for the step before.
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
