from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bkn_core.data.mask_sets import OUTSIDE, MaskSet, inside
from bkn_core.data.mask_splits import load_masks
from bkn_core.data.splits import DataSplits
from bkn_core.errors import InputError

SIZES = {"a": (20, 30), "b": (16, 16), "c": (17, 40)}


def write(root: Path) -> Path:
    """Pictures of three sizes, their masks as grey PNG, palette PNG and npy."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for side in ("images", "masks"):
            (root / split / side).mkdir(parents=True)
        for name, size in SIZES.items():
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / "images" / f"{name}.png")
            mask = rng.integers(0, 3, size, dtype=np.uint8)
            mask[0] = 255
            if name == "c":
                np.save(root / split / "masks" / "c.npy", mask.astype(np.int64))
                continue
            picture = Image.fromarray(mask)
            if name == "b":
                picture.putpalette([200, 0, 0, 0, 200, 0] * 128)
            picture.save(root / split / "masks" / f"{name}.png")
    (root / "classes.txt").write_text("ground\ncell\nedge\n")
    return root


def load(root: Path) -> DataSplits:
    return load_masks("maskfolder", root=root, image_size=16)


def numbers(root: Path, name: str) -> np.ndarray:
    path = root / "train" / "masks" / name
    return np.load(path) if name.endswith("npy") else np.array(Image.open(path))


def test_masks_of_every_kind_are_read_as_class_numbers(tmp_path: Path) -> None:
    root = write(tmp_path / "cells")
    splits = load(root)
    assert splits.classes == ("ground", "cell", "edge") and isinstance(splits.train, MaskSet)
    for mask, name in zip(splits.train.masks, ("a.png", "b.png", "c.npy"), strict=True):
        assert np.array_equal(mask.numpy(), numbers(root, name))


def test_a_zip_file_and_a_folder_hold_the_same(tmp_path: Path) -> None:
    root = write(tmp_path / "cells")
    with zipfile.ZipFile(tmp_path / "cells.zip", "w") as archive:
        for path in root.rglob("*.*"):
            archive.write(path, path.relative_to(tmp_path))
    one, other = load(root), load(tmp_path / "cells.zip")
    assert isinstance(one.train, MaskSet) and isinstance(other.train, MaskSet)
    assert one.train.digests() == other.train.digests() and one.preprocess == other.preprocess


def test_an_npz_holds_masks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"{part}_images": rng.integers(0, 256, (4, 8, 9, 3), dtype=np.uint8) for part in ("train", "test", "val")}
    arrays |= {f"{part}_masks": rng.integers(0, 3, (4, 8, 9)) for part in ("train", "test", "val")}
    np.savez(tmp_path / "cells.npz", **arrays)
    splits = load_masks("maskfolder", root=tmp_path / "cells.npz", image_size=None)
    assert splits.classes == ("0", "1", "2") and splits.preprocess.image_size == (8, 9)
    images, masks = splits.deciding.batch(torch.arange(4))
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), arrays["val_images"])
    assert np.array_equal(masks.numpy(), arrays["val_masks"])


def test_a_batch_of_several_sizes_gives_each_image_back(tmp_path: Path) -> None:
    train = load(write(tmp_path / "cells")).train
    assert isinstance(train, MaskSet)
    images, masks = train.batch(torch.arange(3))
    assert images.shape == (3, 3, 20, 40) and (masks[1, 16:] == OUTSIDE).all()
    for i in range(3):
        image, mask = inside(images[i], masks[i])
        assert torch.equal(image, train.pictures[i]) and torch.equal(mask, train.masks[i].long())
    assert [part.tolist() for part in train.alike(2)] == [[0], [1], [2]]


def unlink(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def resize(root: Path) -> None:
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(root / "test" / "masks" / "a.png")


def renumber(root: Path) -> None:
    Image.fromarray(np.full((16, 16), 3, np.uint8)).save(root / "test" / "masks" / "b.png")


def colour(root: Path) -> None:
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(root / "train" / "masks" / "a.png")


def damage(root: Path) -> None:
    (root / "train" / "masks" / "c.npy").write_bytes(b"\x93NUMPY nothing")


def go_below(root: Path) -> None:
    np.save(root / "train" / "masks" / "c.npy", np.full((17, 40), -1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (unlink("train/masks/a.png"), r"train/images/a.png has no mask"),
        (unlink("test/images/b.png"), r"test/masks/b.png has no image"),
        (resize, r"test/masks/a.png is 5 x 6, but .*test/images/a.png is 20 x 30"),
        (renumber, r"the mask of .*test/images/b.png holds the number 3, but there are 3 classes"),
        (colour, r"train/masks/a.png has the colour mode RGB"),
        (damage, r"train/masks/c.npy cannot be read"),
        (go_below, r"train/masks/c.npy holds the number -1"),
    ],
)
def test_a_pair_that_does_not_fit_is_named(change: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    root = write(tmp_path / "cells")
    change(root)
    with pytest.raises(InputError, match=said):
        load(root)
