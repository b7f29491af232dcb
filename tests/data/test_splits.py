"""The data room as the rest of the engine sees it."""

import io
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bkn_core.data import splits
from bkn_core.data.batches import epoch_order
from bkn_core.data.splits import ImageSet, LazyImageSet, load_data, prefetch
from bkn_core.errors import InputError, RecipeError

CIFAR10 = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10.zip"
DESCRIPTORS = Path("/proc/self/fd")


def write_pictures(root: Path, size: tuple[int, int] = (10, 8)) -> Path:
    draw = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 7)):
        for name in ("cat", "dog", "eel"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return root


def test_digits_load_grey_with_their_statistics() -> None:
    splits = load_data("digits", root="unused", image_size=16)
    assert isinstance(splits.train, ImageSet)
    assert splits.train.images.shape == (1437, 1, 16, 16)
    assert splits.test.batch(torch.arange(360))[0].shape == (360, 1, 16, 16)
    assert splits.classes == splits.train.classes == tuple("0123456789")
    assert (splits.preprocess.color, splits.preprocess.image_size) == ("L", (16, 16))
    pixels = splits.train.images.double() / 255
    assert splits.preprocess.mean[0] == round(pixels.mean().item(), 4)
    assert splits.preprocess.std[0] == round(pixels.std(correction=0).item(), 4)


def test_size_none_keeps_that_of_the_images(tmp_path: Path) -> None:
    assert load_data("digits", root="unused", image_size=None).preprocess.image_size == (8, 8)
    folder = load_data("imagefolder", root=write_pictures(tmp_path), image_size=None)
    assert folder.preprocess.image_size == (10, 8)


def test_size_may_differ_in_height_and_width() -> None:
    splits = load_data("digits", root="unused", image_size=(12, 20))
    assert splits.preprocess.image_size == (12, 20)
    assert splits.test.batch(torch.arange(2))[0].shape == (2, 1, 12, 20)


def test_grey_images_repeat_when_rgb_is_asked_for() -> None:
    grey = load_data("digits", root="unused", image_size=16)
    splits = load_data("digits", root="unused", image_size=16, color="RGB")
    indices = torch.arange(0, 1437, 50)
    assert torch.equal(splits.train.batch(indices)[0], grey.train.batch(indices)[0].expand(-1, 3, -1, -1))
    assert splits.preprocess.mean == grey.preprocess.mean * 3


def test_batch_holds_the_images_and_labels_asked_for() -> None:
    train = load_data("digits", root="unused", image_size=8).train
    assert isinstance(train, ImageSet)
    images, labels = train.batch(torch.tensor([5, 3, 5]))
    assert torch.equal(images, torch.stack([train.images[5], train.images[3], train.images[5]]))
    assert labels.tolist() == [train.labels[5], train.labels[3], train.labels[5]]
    assert (images.dtype, labels.dtype, len(train)) == (torch.uint8, torch.int64, 1437)


def test_subsets_are_balanced_and_fixed() -> None:
    torch.manual_seed(0)
    first = load_data("digits", root="unused", image_size=8, train_images=100, test_images=20)
    torch.manual_seed(1)
    again = load_data("digits", root="unused", image_size=8, train_images=100, test_images=20)
    assert first.train.labels.bincount().tolist() == [10] * 10
    assert first.test.labels.bincount().tolist() == [2] * 10
    assert torch.equal(first.train.batch(torch.arange(100))[0], again.train.batch(torch.arange(100))[0])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"train_images": 1438}, "data.train_images is 1438, but digits has 1437 training images"),
        ({"test_images": 361}, "data.test_images is 361, but digits has 360 test images"),
        ({"train_images": 0}, "data.train_images is 0, but digits has 1437 training images"),
    ],
)
def test_more_images_than_there_are_is_an_error_with_both_numbers(wanted: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_data("digits", root="unused", image_size=8, **wanted)


def test_only_chosen_images_are_decoded(tmp_path: Path) -> None:
    root = write_pictures(tmp_path)
    never_read = 0
    for path in sorted(root.glob("*/*/*.png")):
        whole = path.read_bytes()
        path.write_bytes(b"")
        try:
            load_data("imagefolder", root=root, image_size=4, train_images=6, test_images=3)
            never_read += 1
        except InputError as error:
            assert path.name in error.message
            path.write_bytes(whole)
    assert never_read == 81 - 9


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("cifar10", "CIFAR10"), ("digit", "digits"), ("ImageFolder", "imagefolder"), ("Mnist", "MNIST")],
)
def test_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=f"data.name is '{name}'; choose one of digits, imagefolder, npz") as caught:
        load_data(name, root="unused", image_size=8)
    assert caught.value.hint == f"Did you mean '{nearest}'?"


@pytest.mark.parametrize("name", ["CocoDetection", "LSUN", "VisionDataset", "__init__"])
def test_what_is_no_classification_set_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="choose one of digits"):
        load_data(name, root="unused", image_size=8)


def test_empty_npz_is_an_error(tmp_path: Path) -> None:
    arrays = {f"{split}_labels": np.zeros(0, int) for split in ("train", "test")}
    images = {f"{split}_images": np.zeros((0, 4, 4), np.uint8) for split in ("train", "test")}
    np.savez(tmp_path / "a.npz", **arrays, **images)
    with pytest.raises(InputError, match="train_images is empty"):
        load_data("npz", root=tmp_path / "a.npz", image_size=8)


@pytest.mark.parametrize("name", ["imagefolder", "digits"])
def test_too_large_a_split_is_decoded_batch_by_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    root = write_pictures(tmp_path)
    whole = load_data(name, root=root, image_size=6)
    monkeypatch.setattr(splits, "MEMORY_LIMIT", 1000)
    lazy = load_data(name, root=root, image_size=6)
    assert isinstance(whole.train, ImageSet)
    assert isinstance(lazy.train, LazyImageSet)
    assert lazy.preprocess == whole.preprocess
    assert (len(lazy.train), lazy.train.classes) == (len(whole.train), whole.train.classes)
    for indices in (torch.tensor([7, 2, 2]), torch.arange(40), torch.tensor([], dtype=torch.int64)):
        for one, other in zip(lazy.train.batch(indices), whole.train.batch(indices), strict=True):
            assert torch.equal(one, other)


def test_lazy_statistics_come_from_a_fixed_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_pictures(tmp_path)
    monkeypatch.setattr(splits, "MEMORY_LIMIT", 1000)
    monkeypatch.setattr(splits, "STATISTICS_IMAGES", 12)
    first = load_data("imagefolder", root=root, image_size=6).preprocess
    assert load_data("imagefolder", root=root, image_size=6).preprocess == first
    monkeypatch.setattr(splits, "STATISTICS_IMAGES", 60)
    assert load_data("imagefolder", root=root, image_size=6).preprocess != first


@pytest.mark.parametrize("limit", [1000, 10**9])
def test_prefetch_yields_the_batches_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(splits, "MEMORY_LIMIT", limit)
    train = load_data("imagefolder", root=write_pictures(tmp_path), image_size=6).train
    batches = epoch_order(60, 0, 0).split(13)
    for (images, labels), indices in zip(prefetch(train, batches), batches, strict=True):
        assert torch.equal(images, train.batch(indices)[0])
        assert torch.equal(labels, train.labels[indices])
    assert list(prefetch(train, [])) == []


def test_prefetch_passes_an_error_on_and_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_pictures(tmp_path)
    monkeypatch.setattr(splits, "MEMORY_LIMIT", 1000)
    train = load_data("imagefolder", root=root, image_size=6).train
    (root / "train" / "dog" / "05.png").write_bytes(b"")
    threads = threading.active_count()
    batches = prefetch(train, torch.arange(60).split(10))
    assert next(batches)[0].shape == (10, 3, 6, 6)
    with pytest.raises(InputError, match=r"train/dog/05\.png cannot be decoded"):
        list(batches)
    batches = prefetch(train, torch.arange(20).split(5))
    next(batches)
    batches.close()
    assert threading.active_count() == threads


@pytest.mark.parametrize("workers", [1, 5])
def test_any_number_of_workers_reads_the_same_and_works_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    root = write_pictures(tmp_path)
    monkeypatch.setattr(splits, "MEMORY_LIMIT", 1000)
    expected = load_data("imagefolder", root=root, image_size=6).train
    train = load_data("imagefolder", root=root, image_size=6, workers=workers).train
    batches = torch.arange(60).split(2)
    at_once, everybody = set(), threading.Barrier(workers)
    read = splits.LazyImageSet.batch

    def watched(images: splits.LazyImageSet, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(at_once) < workers:  # nobody goes on before all are there
            at_once.add(threading.get_ident())
            everybody.wait(20)
        return read(images, indices)

    monkeypatch.setattr(splits.LazyImageSet, "batch", watched)
    for (images, labels), indices in zip(prefetch(train, batches), batches, strict=True):
        assert torch.equal(images, expected.source.read(indices, "RGB", (6, 6)))
        assert torch.equal(labels, expected.labels[indices])
    assert len(at_once) == workers


def test_loading_leaves_the_state_of_the_process_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads(), torch.get_default_dtype()
    load_data("imagefolder", root=write_pictures(tmp_path), image_size=6, train_images=30)
    load_data("digits", root="unused", image_size=16)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert (torch.get_num_threads(), torch.get_default_dtype()) == before[2:]


@pytest.mark.skipif(not DESCRIPTORS.exists(), reason="this system does not list the open files of a process")
def test_loading_leaves_no_file_open(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data")
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for picture in (tmp_path / "data").rglob("*.png"):
            archive.write(picture, picture.relative_to(tmp_path))
    before = len(list(DESCRIPTORS.iterdir()))
    kept = [load_data("imagefolder", root=root, image_size=6) for root in (path, path, tmp_path / "data")]
    assert len(list(DESCRIPTORS.iterdir())) == before
    assert torch.equal(kept[0].train.batch(torch.arange(60))[0], kept[2].train.batch(torch.arange(60))[0])


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.exists(), reason="shared/data/cifar10.zip is not beside the repository")
def test_cifar10_zip_loads_a_subset_as_pillow_reads_it() -> None:
    splits = load_data("imagefolder", root=CIFAR10, image_size=None, train_images=10_000, test_images=2_000)
    assert splits.train.labels.bincount().tolist() == [1000] * 10
    assert splits.test.labels.bincount().tolist() == [200] * 10
    assert splits.classes[:3] == ("airplane", "automobile", "bird")
    # The published channel means of CIFAR-10; JPEG coding and the subset move them by less than a hundredth.
    np.testing.assert_allclose(splits.preprocess.mean, (0.4914, 0.4822, 0.4465), atol=0.01)
    chosen = set()
    with zipfile.ZipFile(CIFAR10) as archive:
        for index in range(5000):
            encoded = archive.read(f"train/frog/{index:04}.jpg")
            chosen.add(np.asarray(Image.open(io.BytesIO(encoded))).tobytes())
    frogs = splits.train.batch(torch.arange(6000, 7000))[0].permute(0, 2, 3, 1).contiguous()
    assert all(frog.numpy().tobytes() in chosen for frog in frogs)


@pytest.mark.parametrize(
    ("size", "together", "match"),
    [
        (30_000, 1, "images of 30000 x 30000 pixels are too large; at most 67108864"),
        ((1, 2**27), 1, "images of 1 x 134217728 pixels are too large"),
        (3000, 250, "250 images of 3000 x 3000 pixels in one forward take 9000000000 bytes; at most 4294967296"),
    ],
)
def test_images_that_no_memory_holds_are_refused_before_one_is_decoded(size: Any, together: int, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        load_data("digits", root="unused", image_size=size, together=together)


def test_a_forward_holds_no_more_images_than_there_are() -> None:
    splits = load_data("digits", root="unused", image_size=64, train_images=8, test_images=4, together=10**12)
    assert splits.preprocess.image_size == (64, 64)


def test_statistics_are_taken_from_fewer_images_where_they_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    measure = splits.channel_statistics
    monkeypatch.setattr(splits, "MEMORY_LIMIT", 1000)
    monkeypatch.setattr(splits, "STATISTICS_BYTES", 10 * 64 + 63)
    monkeypatch.setattr(splits, "channel_statistics", lambda images: (seen.append(len(images)), measure(images))[1])
    load_data("digits", root="unused", image_size=8)
    assert seen == [10]


def test_home_of_nobody_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"~nosuchuser/x begins with a home folder that is not known"):
        load_data("npz", root="~nosuchuser/x", image_size=8)
