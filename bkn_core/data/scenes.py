"""A small segmentation data set without a download: scanned digits in random colours on a textured ground."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

SIZE, GLYPH, GLYPHS = 64, 24, 4
TRAIN, TEST = 800, 200
CLASSES = ("ground", "0", "4", "7")
_INK = 0.5  # of the full stroke: where a pixel belongs to a digit

Pair = tuple[Tensor, Tensor]


@functools.lru_cache(maxsize=1)
def open_scenes() -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """Return the training and the test scenes, (3, 64, 64) and (64, 64), always the same; they share no digit."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = np.isin(digits.target, [int(name) for name in CLASSES[1:]])
    images, numbers = digits.images[chosen], digits.target[chosen]
    glyphs = F.interpolate(torch.from_numpy(images / 16)[:, None], GLYPH, mode="bicubic", align_corners=False)
    inks, labels = glyphs[:, 0].clamp(0, 1).numpy(), np.asarray([CLASSES.index(str(number)) for number in numbers])
    rng, cut = np.random.RandomState(0), len(inks) * TRAIN // (TRAIN + TEST)
    train = tuple(_scene(rng, inks[:cut], labels[:cut]) for _ in range(TRAIN))
    return train, tuple(_scene(rng, inks[cut:], labels[cut:]) for _ in range(TEST))


def _scene(rng: np.random.RandomState, inks: NDArray[np.float64], labels: NDArray[np.int64]) -> Pair:
    picture, mask = _texture(rng), np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(GLYPHS):
        chosen, (row, column) = rng.randint(len(inks)), rng.randint(0, SIZE - GLYPH + 1, 2)
        place, ink = (slice(row, row + GLYPH), slice(column, column + GLYPH)), inks[chosen][..., None]
        picture[place] = picture[place] * (1 - ink) + ink * rng.random_sample(3)
        mask[place][ink[..., 0] > _INK] = labels[chosen]
    pixels = np.rint(255 * picture).astype(np.uint8).transpose(2, 0, 1).copy()
    return torch.from_numpy(pixels), torch.from_numpy(mask)


def _texture(rng: np.random.RandomState) -> NDArray[np.float64]:
    """Noise of four sizes and stripes between two colours, (64, 64, 3)."""
    total = np.zeros((SIZE, SIZE))
    for side in (4, 8, 16, 32):
        total += np.kron(rng.random_sample((side, side)), np.ones((SIZE // side, SIZE // side))) / side
    rows, columns = np.mgrid[:SIZE, :SIZE]
    slope, width = rng.random_sample() * np.pi, rng.randint(3, 12)
    total += 0.15 * np.sin((np.cos(slope) * rows + np.sin(slope) * columns) / width)
    share = ((total - total.min()) / np.ptp(total))[..., None]
    return np.asarray(share * rng.random_sample(3) + (1 - share) * rng.random_sample(3))
