"""Reading on demand, and the fixed choice of images."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional

from bkn_core.data import sources
from bkn_core.data.sources import ArraySource, PictureSource, choose, hold_out
from bkn_core.errors import InputError

CLASSES = ("a", "b", "c")


def pixels_of(index: int) -> np.ndarray:
    size = (20, 14, 3) if index % 5 < 3 else (9, 31, 3)
    return np.random.default_rng(index).integers(0, 256, size, dtype=np.uint8)


def open_drawn(index: int) -> Image.Image:
    return Image.fromarray(pixels_of(index))


def picture_source(open_picture: Callable[[int], Image.Image] = open_drawn, count: int = 50) -> PictureSource:
    return PictureSource(torch.arange(count) % 3, CLASSES, open_picture, lambda index: f"image {index}", threads=2)


@pytest.mark.parametrize("color", ["RGB", "L"])
def test_pictures_read_together_equal_pictures_read_one_at_a_time(color: str) -> None:
    indices = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, *range(50)])
    images = picture_source().read(indices, color, (8, 10))
    for image, index in zip(images, indices.tolist(), strict=True):
        pixels = np.atleast_3d(np.asarray(open_drawn(index).convert(color)))
        expected = functional.resize(torch.tensor(pixels).permute(2, 0, 1), [8, 10], antialias=True)
        assert torch.equal(image, expected)


def test_pictures_that_are_resized_together_are_few_where_they_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    together, resize = [], sources.resize
    expected = picture_source().read(torch.arange(50), "RGB", (8, 10))

    def watched(images: torch.Tensor, *how: object) -> torch.Tensor:
        together.append(images.numel())
        return resize(images, *how)

    monkeypatch.setattr(sources, "resize", watched)
    monkeypatch.setattr(sources, "STACK_BYTES", 2 * 20 * 14 * 3)
    assert torch.equal(picture_source().read(torch.arange(50), "RGB", (8, 10)), expected)
    assert max(together) == 2 * 20 * 14 * 3


def test_array_and_picture_sources_agree() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 12, 9, 3), dtype=np.uint8)
    labels = torch.arange(70) % 3
    arrays = ArraySource(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels, CLASSES)
    files = picture_source(lambda index: Image.fromarray(pixels[index]), 70)
    wanted = torch.arange(0, 70, 3)
    assert arrays.color() == files.color() == "RGB"
    assert arrays.size() == files.size() == (12, 9)
    for color in ("RGB", "L"):
        assert torch.equal(arrays.read(wanted, color, (6, 6)), files.read(wanted, color, (6, 6)))


def test_taken_images_keep_their_pixels_labels_and_names() -> None:
    taken = picture_source().take(torch.tensor([40, 7])).take(torch.tensor([1]))
    assert taken.labels.tolist() == [7 % 3]
    assert taken.name(0) == "image 7"
    assert torch.equal(taken.read(torch.tensor([0]), "RGB", (20, 14))[0], torch.tensor(pixels_of(7)).permute(2, 0, 1))


def test_only_a_wholly_grey_source_is_grey() -> None:
    assert picture_source(lambda index: open_drawn(index).convert("L")).color() == "L"
    assert picture_source(lambda index: open_drawn(index).convert("L" if index < 49 else "RGB")).color() == "RGB"


def test_first_damaged_picture_ends_the_reading() -> None:
    opened = []

    def open_picture(index: int) -> Image.Image:
        opened.append(index)
        if index == 3:
            raise InputError("image 3 is damaged")
        time.sleep(0.001)
        return open_drawn(index)

    threads = threading.active_count()
    with pytest.raises(InputError, match="image 3 is damaged"):
        picture_source(open_picture, 5000).read(torch.arange(5000), "RGB", (4, 4))
    assert len(opened) < 500
    assert threading.active_count() == threads


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), data=st.data())
def test_choice_is_as_even_over_the_classes_as_they_allow(labels: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(labels)))
    chosen = choose(torch.tensor(labels), count)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == count
    sizes = np.bincount(labels, minlength=5)
    taken = np.bincount(np.array(labels)[chosen.numpy()], minlength=5)
    short = taken < sizes
    # A class that has images left over has no fewer in the choice than any other, but for the remainder of one.
    assert not short.any() or taken[short].min() >= taken.max() - 1


def choose_by_hand(labels: list[int], count: int) -> list[int]:
    """Deal the shuffled images of each class in turns, lowest class first."""
    piles: dict[int, list[int]] = {label: [] for label in sorted(set(labels))}
    for index in np.random.RandomState(0).permutation(len(labels)).tolist():
        piles[labels[index]].append(index)
    dealt: list[int] = []
    while len(dealt) < count:
        dealt += [pile.pop(0) for pile in piles.values() if pile]
    return sorted(dealt[:count])


@pytest.mark.parametrize("count", [1, 4, 50, 90])
def test_choice_deals_a_fixed_shuffle_whatever_the_seeds_are(count: int) -> None:
    labels = [0] * 60 + [2] * 5 + [1] * 25
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert choose(torch.tensor(labels), count).tolist() == choose_by_hand(labels, count)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_smaller_choices_lie_in_larger_ones() -> None:
    labels = torch.arange(1000) % 7
    assert set(choose(labels, 100).tolist()) < set(choose(labels, 300).tolist())


def test_held_out_images_are_stratified_and_apart() -> None:
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 10)
    images = torch.arange(160, dtype=torch.uint8).reshape(160, 1, 1, 1)
    train, test = hold_out(ArraySource(images, labels, CLASSES), 32)
    assert test.labels.bincount().tolist() == [20, 10, 2]
    everything = torch.cat([source.read(torch.arange(len(source.labels)), "L", (1, 1)) for source in (train, test)])
    assert sorted(everything.flatten().tolist()) == list(range(160))
