"""Data sets of torchvision, against torchvision's own items."""

import inspect
import json
import pickle
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision import datasets

from bkn_core.data.sources import ArraySource, PictureSource, Source
from bkn_core.data.splits import load_data
from bkn_core.data.torchvision_sets import NAMES, open_torchvision
from bkn_core.errors import InputError

DRAW = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the network was touched")  # no Exception: nothing that reports data faults catches it

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist(root: Path, name: str = "MNIST", highest: int = 9) -> None:
    for split, count in (("train", 30), ("t10k", 20)):
        images = DRAW.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(root / name / "raw" / f"{split}-images-idx3-ubyte", images)
        write_idx(
            root / name / "raw" / f"{split}-labels-idx1-ubyte", (np.arange(count) % (highest + 1)).astype(np.uint8)
        )


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for batch in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        data = {"data": DRAW.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": DRAW.integers(0, 10, 4).tolist()}
        (folder / batch).write_bytes(pickle.dumps(data))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {label}" for label in range(10)]}))


def write_cifar100(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = root / "cifar-100-python"
    folder.mkdir()
    for split, count in (("train", 30), ("test", 20)):
        data = {"data": DRAW.integers(0, 256, (count, 3072), dtype=np.uint8), "fine_labels": list(range(count))}
        (folder / split).write_bytes(pickle.dumps(data))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {label}" for label in range(100)]}))


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    for split in ("train", "test"):
        images = DRAW.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
        scipy.io.savemat(root / f"{split}_32x32.mat", {"X": images, "y": np.arange(20)[:, None] % 10 + 1})


def write_pictures(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(DRAW.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(path)


def write_food(root: Path) -> None:
    files = {"soup": ["soup/1", "soup/2"], "apple": ["apple/3"]}
    write_pictures(root / "food-101" / "images", [f"{name}.jpg" for names in files.values() for name in names])
    (root / "food-101" / "meta").mkdir()
    for split in ("train", "test"):
        (root / "food-101" / "meta" / f"{split}.json").write_text(json.dumps(files))


def write_reviews(root: Path) -> None:
    names = [
        f"{split}/{label}/{n}.png" for split in ("train", "test") for label in ("negative", "positive") for n in (0, 1)
    ]
    write_pictures(root / "rendered-sst2", names)


def assert_same(source: Source, dataset: Any) -> None:
    """The source holds the pictures and labels that the data set gives one by one."""
    assert source.labels.tolist() == [label for _, label in dataset]
    for index, (picture, _) in enumerate(dataset):
        image = source.read(torch.tensor([index]), source.color(), picture.size[::-1])[0]
        np.testing.assert_array_equal(image.permute(1, 2, 0).squeeze(-1), np.asarray(picture))


def test_mnist_is_read_as_an_array(tmp_path: Path) -> None:
    write_mnist(tmp_path, "FashionMNIST")
    train, test = open_torchvision("FashionMNIST", tmp_path, download=False)
    assert isinstance(train, ArraySource)
    assert train.color() == "L"
    assert train.classes == tuple(datasets.FashionMNIST.classes)
    assert_same(train, datasets.FashionMNIST(tmp_path, train=True))
    assert_same(test, datasets.FashionMNIST(tmp_path, train=False))


def test_cifar_is_read_as_an_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch)
    train, test = open_torchvision("CIFAR10", tmp_path, download=False)
    assert isinstance(train, ArraySource)
    assert train.classes == tuple(f"class {label}" for label in range(10))
    assert_same(train, datasets.CIFAR10(tmp_path, train=True))
    assert_same(test, datasets.CIFAR10(tmp_path, train=False))


@pytest.mark.parametrize("place", ["", "FOLDER"])
@pytest.mark.parametrize(
    ("write", "kind", "classes"), [(write_cifar, datasets.CIFAR10, 10), (write_cifar100, datasets.CIFAR100, 100)]
)
def test_an_unpacked_cifar_needs_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, write: Any, kind: Any, classes: int
) -> None:
    write(tmp_path, monkeypatch)
    splits = load_data("imagefolder", root=tmp_path / place.replace("FOLDER", kind.base_folder), image_size=None)
    assert splits.classes == tuple(f"class {label}" for label in range(classes))
    for images, expected in ((splits.train, kind(tmp_path)), (splits.test, kind(tmp_path, train=False))):
        found, labels = images.batch(torch.arange(len(images)))
        assert torch.equal(found, torch.from_numpy(expected.data).permute(0, 3, 1, 2))
        assert labels.tolist() == expected.targets


def test_two_unpacked_sets_in_one_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch), write_cifar100(tmp_path, monkeypatch)
    with pytest.raises(InputError, match=r"holds CIFAR10 and CIFAR100\nName the folder of one of them"):
        load_data("imagefolder", root=tmp_path, image_size=None)
    assert len(load_data("imagefolder", root=tmp_path / "cifar-100-python", image_size=None).classes) == 100


def test_svhn_is_read_as_an_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch)
    train, test = open_torchvision("SVHN", tmp_path, download=False)
    assert isinstance(train, ArraySource)
    assert train.classes == tuple("0123456789")
    assert_same(train, datasets.SVHN(tmp_path, split="train"))
    assert_same(test, datasets.SVHN(tmp_path, split="test"))


@pytest.mark.parametrize(
    ("name", "write", "classes"),
    [("Food101", write_food, ("apple", "soup")), ("RenderedSST2", write_reviews, ("negative", "positive"))],
)
def test_sets_of_files_list_their_labels_undecoded(tmp_path: Path, name: str, write: Any, classes: Any) -> None:
    write(tmp_path)
    kind = getattr(datasets, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "__getitem__", lambda *_: pytest.fail("an image was decoded"))
        train, test = open_torchvision(name, tmp_path, download=False)
    assert isinstance(train, PictureSource)
    assert train.classes == classes
    assert_same(train, kind(tmp_path, split="train"))
    assert_same(test, kind(tmp_path, split="test"))


def test_set_without_a_test_part_has_a_stratified_fifth_held_out(tmp_path: Path) -> None:
    names = [f"{label}/{number}.jpg" for label, count in (("River", 20), ("Forest", 30)) for number in range(count)]
    write_pictures(tmp_path / "eurosat" / "2750", names)
    train, test = open_torchvision("EuroSAT", tmp_path, download=False)
    assert train.classes == ("Forest", "River")
    assert train.labels.bincount().tolist() == [24, 16]
    assert test.labels.bincount().tolist() == [6, 4]
    assert not {train.name(index) for index in range(40)} & {test.name(index) for index in range(10)}


def test_fake_data_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    train, test = open_torchvision("FakeData", Path(), download=False)
    images = test.read(torch.arange(8), "RGB", (8, 8))
    assert (len(train.labels), len(test.labels)) == (800, 200)
    assert images.float().std() > 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "FakeData"])
def test_missing_files_are_reported_offline(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} cannot be read from data.root") as caught:
        open_torchvision(name, tmp_path, download=False)
    assert f"files of {name} under {tmp_path}" in caught.value.hint
    parameters = inspect.signature(getattr(datasets, name)).parameters
    assert ("data.download=true" in caught.value.hint) == ("download" in parameters)


def test_the_network_is_touched_when_a_download_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="the network was touched"):
        open_torchvision("MNIST", tmp_path, download=True)


def test_failed_download_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    with pytest.raises(InputError, match=r"MNIST cannot be read from data\.root") as caught:
        open_torchvision("MNIST", tmp_path, download=True)
    assert "data.download" not in caught.value.hint


def test_truncated_file_is_reported(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"MNIST cannot be read from data\.root"):
        open_torchvision("MNIST", tmp_path, download=False)


def test_truncated_picture_is_named(tmp_path: Path) -> None:
    write_food(tmp_path)
    (tmp_path / "food-101" / "images" / "soup" / "2.jpg").write_bytes(b"")
    train, _ = open_torchvision("Food101", tmp_path, download=False)
    with pytest.raises(InputError, match="image 1 of Food101 cannot be read"):
        train.read(torch.arange(3), "RGB", (4, 4))


def test_label_out_of_range_is_reported(tmp_path: Path) -> None:
    write_mnist(tmp_path, highest=12)
    with pytest.raises(InputError, match="MNIST has a label 12 but 10 classes"):
        open_torchvision("MNIST", tmp_path, download=False)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_can_be_built_from_a_root_alone(name: str) -> None:
    parameters = inspect.signature(getattr(datasets, name)).parameters.values()
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = {one.name for one in parameters if one.default is inspect.Parameter.empty and one.kind not in variadic}
    assert needed <= {"root"}
