"""The image sets of robustness.py: cut or drawn from fixed seeds, offline, kept as .npz files.

    cifar            CIFAR-10 halved to 16×16, of a zip of train/CLASS/* and test/CLASS/*
    cifar-inverted   the same as a negative, and
    cifar-faint      at a tenth of its contrast; both standardized as `cifar` is, so the network sees the difference
    glyphs           letters of ten kinds, white on black 28×28, in many fonts, sizes, places, slants and strokes
    digits           scikit-learn's digits, enlarged, on black 28×28 at random places
    textures         turned 24×24 pieces of scikit-image's brick, grass and gravel (where scikit-image is installed)
    scenes           letters of three kinds in any colour on CIFAR-10 photographs of 64×64, with a class per pixel

Validation images come from the training part of CIFAR-10, from other digits, other places of the textures.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

VERSION = 1  # of what is drawn: another one makes new files and new runs
PARTS = ("train", "validation", "test")
COUNTS = {"train": 10_000, "validation": 2_000, "test": 2_000}
SCENE_COUNTS = {"train": 2_000, "validation": 400, "test": 400}
CLASSES = {"cifar": 10, "glyphs": 10, "digits": 10, "textures": 3, "scenes": 4}
BASES = {"cifar-inverted": "cifar", "cifar-faint": "cifar"}  # kept as the other's file
NAMES = ("cifar", "cifar-inverted", "cifar-faint", "glyphs", "digits", "textures", "scenes")

LETTERS, SCENE_LETTERS = "ABEGHKMRSW", "AOX"
STONES = ("brick", "grass", "gravel")
STRIPS = {"train": (0, 320), "validation": (320, 416), "test": (416, 512)}  # columns of a texture
DIGITS = {"train": slice(0, 1_200), "validation": slice(1_200, 1_500), "test": slice(1_500, None)}

Arrays = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Sources:
    """Where images come from and are kept.

    Args:
        cache: folder of the .npz files.
        cifar: the zip of CIFAR-10, if there is one.
    """

    cache: Path
    cifar: Path | None = None


def base(name: str) -> str:
    """Name the set whose file an image set is read from."""
    return BASES.get(name, name)


def classes(name: str) -> int:
    """Count the classes of an image set."""
    return CLASSES[base(name)]


def is_segmentation(name: str) -> bool:
    """Whether an image set has a class per pixel."""
    return name == "scenes"


def missing(name: str, sources: Sources) -> str | None:
    """Say why an image set cannot be made here, or None where it can."""
    if base(name) in ("cifar", "scenes") and sources.cifar is None:
        return "needs --cifar PATH, a zip of train/CLASS/* and test/CLASS/*"
    if name == "textures" and importlib.util.find_spec("skimage") is None:
        return "needs scikit-image, whose wheel holds the photographs"
    return None


def load(name: str, part: str, sources: Sources) -> tuple[Tensor, Tensor]:
    """Return images as a network sees them (N, C, H, W) and labels (N) or (N, H, W); makes their file at first.

    Each channel has mean 0 and deviation 1 over the training images of the set that the file holds.
    """
    mean, deviation = _standard(base(name), sources)
    pixels, labels = _read(base(name), part, sources)
    images = torch.from_numpy(pixels).float() / 255
    if name == "cifar-inverted":
        images = 1 - images
    if name == "cifar-faint":
        images = 0.5 + (images - 0.5) / 10
    return (images - mean) / deviation, torch.from_numpy(labels).long()


def prepare(name: str, part: str, sources: Sources) -> Path:
    """Make the file of a part where there is none, and return its path."""
    path = sources.cache / f"{base(name)}-{part}-{VERSION}.npz"
    if not path.exists():
        counts = SCENE_COUNTS if name == "scenes" else COUNTS
        images, labels = MAKERS[base(name)](part, counts[part], sources)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        with unfinished.open("wb") as file:
            np.savez_compressed(file, images=images, labels=labels)
        unfinished.replace(path)
    return path


@functools.lru_cache(maxsize=4)
def _read(name: str, part: str, sources: Sources) -> Arrays:
    with np.load(prepare(name, part, sources)) as file:
        return file["images"], file["labels"]


@functools.lru_cache(maxsize=8)
def _standard(name: str, sources: Sources) -> tuple[Tensor, Tensor]:
    pixels = torch.from_numpy(_read(name, "train", sources)[0]).float() / 255
    variance, mean = torch.var_mean(pixels, (0, 2, 3), correction=0, keepdim=True)
    return mean[0], variance[0].sqrt()


def _generator(name: str, part: str) -> np.random.Generator:
    return np.random.default_rng([VERSION, NAMES.index(name), PARTS.index(part)])


def _photographs(part: str, count: int, sources: Sources) -> tuple[list[Image.Image], np.ndarray]:
    """Read CIFAR-10 images in an order of chance that never changes; validation follows after all of training."""
    assert sources.cifar is not None
    folder, first = ("test/", 0) if part == "test" else ("train/", COUNTS["train"] * (part == "validation"))
    with zipfile.ZipFile(sources.cifar) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(folder) and not name.endswith("/"))
        kinds = sorted({name.split("/")[1] for name in names})
        chosen = np.random.default_rng(VERSION).permutation(len(names))[first : first + count]
        images = [Image.open(io.BytesIO(archive.read(names[i]))).convert("RGB") for i in chosen]
    return images, np.array([kinds.index(names[i].split("/")[1]) for i in chosen])


def make_cifar(part: str, count: int, sources: Sources) -> Arrays:
    """Halve CIFAR-10 images, each pixel the mean of four."""
    images, labels = _photographs(part, count, sources)
    return np.stack([np.asarray(image.reduce(2)).transpose(2, 0, 1) for image in images]), labels


@functools.cache
def _fonts() -> list[ImageFont.FreeTypeFont]:
    """Load the fonts that come with matplotlib and have plain letters."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    families = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmr10", "cmb10", "cmss10", "cmtt10", "cmti10")
    paths = sorted(path for path in folder.glob("*.ttf") if path.stem.startswith(families))
    return [ImageFont.truetype(str(path), 56) for path in paths if "Display" not in path.stem]


def draw_letter(random: np.random.Generator, letter: str, height: int) -> np.ndarray:
    """Draw a letter of chance's font, stroke and slant as a mask of grey values, `height` high and at most as wide."""
    fonts = _fonts()
    image = Image.new("L", (144, 144))
    font, stroke = fonts[random.integers(len(fonts))], int(random.integers(0, 5))
    ImageDraw.Draw(image).text((72, 72), letter, fill=255, font=font, anchor="mm", stroke_width=stroke)
    slant = float(random.uniform(-0.4, 0.4))
    image = image.transform(image.size, Image.Transform.AFFINE, (1, slant, -72 * slant, 0, 1, 0), Image.BILINEAR)
    image = image.crop(image.getbbox())
    width = min(height, max(1, round(height * image.width / image.height)))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def _place(random: np.random.Generator, mask: np.ndarray, size: int) -> tuple[slice, slice]:
    """Choose where in a square a mask lies."""
    top, left = (int(random.integers(size - extent + 1)) for extent in mask.shape)
    return slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1])


def make_glyphs(part: str, count: int, sources: Sources) -> Arrays:
    """Draw one letter on each image."""
    random = _generator("glyphs", part)
    images, labels = np.zeros((count, 1, 28, 28), np.uint8), random.integers(len(LETTERS), size=count)
    for image, label in zip(images, labels, strict=True):
        mask = draw_letter(random, LETTERS[label], int(random.integers(11, 25)))
        image[0][_place(random, mask, 28)] = mask
    return images, labels


def make_digits(part: str, count: int, sources: Sources) -> Arrays:
    """Paste one enlarged digit on each image."""
    from sklearn.datasets import load_digits

    digits, random = load_digits(), _generator("digits", part)
    members = np.random.default_rng(VERSION).permutation(len(digits.target))[DIGITS[part]]
    chosen = random.choice(members, count)
    images = np.zeros((count, 1, 28, 28), np.uint8)
    for image, index in zip(images, chosen, strict=True):
        side = int(random.integers(13, 25))
        small = Image.fromarray((digits.images[index] * 255 / 16).astype(np.uint8))
        mask = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))
        image[0][_place(random, mask, 28)] = mask
    return images, digits.target[chosen].astype(np.int64)


@functools.cache
def _texture(name: str) -> Image.Image:
    """Read a photograph out of the installed package, without importing it."""
    found = importlib.util.find_spec("skimage")
    assert found is not None and found.origin is not None
    return Image.open(Path(found.origin).parent / "data" / f"{name}.png").convert("L")


def make_textures(part: str, count: int, sources: Sources) -> Arrays:
    """Cut pieces out of one strip of each photograph, turn them and change their contrast and brightness."""
    random = _generator("textures", part)
    images, labels = np.zeros((count, 1, 24, 24), np.uint8), random.integers(len(STONES), size=count)
    for image, label in zip(images, labels, strict=True):
        stone, (first, end) = _texture(STONES[label]), STRIPS[part]
        left, top = int(random.integers(first, end - 36 + 1)), int(random.integers(stone.height - 36 + 1))
        piece = stone.crop((left, top, left + 36, top + 36)).rotate(random.uniform(0, 360), Image.BILINEAR)
        values = np.asarray(piece.crop((6, 6, 30, 30)), np.float64)
        changed = random.uniform(0.4, 1.3) * (values - values.mean()) + values.mean() + random.uniform(-40, 40)
        image[0] = changed.round().clip(0, 255)
    return images, labels


def make_scenes(part: str, count: int, sources: Sources) -> Arrays:
    """Paste one to four letters in colours of chance on each photograph; class 0 is the photograph."""
    random = _generator("scenes", part)
    images, labels = np.zeros((count, 3, 64, 64), np.uint8), np.zeros((count, 64, 64), np.int64)
    photographs, _ = _photographs(part, count, sources)
    for image, label, photograph in zip(images, labels, photographs, strict=True):
        picture = np.asarray(photograph.resize((64, 64), Image.Resampling.BICUBIC)).astype(np.float64)
        for _ in range(random.integers(1, 5)):
            kind = int(random.integers(len(SCENE_LETTERS)))
            mask = draw_letter(random, SCENE_LETTERS[kind], int(random.integers(18, 41)))
            place, opacity = _place(random, mask, 64), mask[..., None] / 255
            picture[place] += opacity * (random.uniform(0, 255, 3) - picture[place])
            label[place][mask > 127] = kind + 1
        image[:] = picture.round().clip(0, 255).transpose(2, 0, 1)
    return images, labels


MAKERS: dict[str, Callable[[str, int, Sources], Arrays]] = {
    "cifar": make_cifar,
    "glyphs": make_glyphs,
    "digits": make_digits,
    "textures": make_textures,
    "scenes": make_scenes,
}
