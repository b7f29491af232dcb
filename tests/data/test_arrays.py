"""The digits and .npz files."""

import io
import pickle
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from bkn_core.data.arrays import open_digits, open_npz
from bkn_core.errors import InputError

DRAW = np.random.default_rng(0)
ARRAYS = {
    "train_images": DRAW.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8),
    "train_labels": np.arange(12) % 4,
    "test_images": DRAW.integers(0, 256, (5, 6, 5, 3), dtype=np.uint8),
    "test_labels": np.arange(5) % 4,
}


def write(path: Path, **changes: np.ndarray | None) -> Path:
    arrays = {key: value for key, value in {**ARRAYS, **changes}.items() if value is not None}
    np.savez_compressed(path, **arrays)
    return path


def refused(path: Path, match: str) -> None:
    start = time.perf_counter()
    with pytest.raises(InputError, match=match):
        open_npz(path)
    assert time.perf_counter() - start < 1


def test_digits_are_scikit_learns_split_once_and_for_all() -> None:
    train, test = open_digits()
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    assert train.classes == tuple("0123456789")
    digits = load_digits()
    np.testing.assert_allclose(test.labels.bincount(), np.bincount(digits.target) / 1797 * 360, atol=1)
    expected = {(image.tobytes(), label) for image, label in zip(digits.images, digits.target, strict=True)}
    images = torch.cat([source.read(torch.arange(len(source.labels)), "L", (8, 8)) for source in (train, test)])
    # 255 / 16 = 15.9375 per level, so a scan comes back by division and rounding.
    scans = np.round(images[:, 0].numpy() / 15.9375)
    labels = torch.cat([train.labels, test.labels]).tolist()
    assert {(scan.tobytes(), label) for scan, label in zip(scans, labels, strict=True)} == expected


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 3)])
def test_npz_gives_its_images_and_labels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = {
        f"{split}_images": DRAW.integers(0, 256, (n, *shape), dtype=np.uint8)
        for split, n in (("train", 12), ("test", 5))
    }
    train, test = open_npz(write(tmp_path / "a.npz", **images))
    assert train.color() == test.color() == ("RGB" if shape[2:] == (3,) else "L")
    assert test.classes == ("0", "1", "2", "3")
    assert train.labels.tolist() == [index % 4 for index in range(12)]
    assert train.labels.dtype == torch.int64
    expected = images["test_images"].reshape(5, 6, 5, -1).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(test.read(torch.arange(5), test.color(), (6, 5)), expected)


def test_npz_may_name_its_classes(tmp_path: Path) -> None:
    names = np.array(["ant", "bee", "cow", "dog", "eel"])
    assert open_npz(write(tmp_path / "a.npz", classes=names))[0].classes == ("ant", "bee", "cow", "dog", "eel")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"test_labels": None}, "a.npz has no array test_labels"),
        ({"train_images": ARRAYS["train_images"].astype(np.float32)}, "train_images is float32"),
        ({"train_images": ARRAYS["train_images"][0, 0]}, r"train_images is uint8 \(5, 3\); allowed is"),
        ({"test_images": np.zeros((5, 6, 5, 2), np.uint8)}, r"test_images is uint8 \(5, 6, 5, 2\); allowed is"),
        ({"train_images": np.zeros((12, 0, 5), np.uint8)}, r"train_images is empty, its shape is \(12, 0, 5\)"),
        ({"train_labels": np.arange(11)}, "train_images has 12 images but train_labels 11 labels"),
        ({"train_labels": ARRAYS["train_labels"].astype(float)}, "train_labels is float64"),
        ({"train_labels": np.zeros((12, 2), int)}, r"train_labels is int64 \(12, 2\); allowed is a row"),
        ({"train_labels": np.full(12, -1)}, r"train_labels\[0\] is -1"),
        ({"train_labels": np.array([0] * 11 + [10**15])}, r"train_labels\[11\] is 1000000000000000; there are 12"),
        (
            {"test_labels": np.array([0, 1, 2, 4, 3])},
            r"test_labels\[3\] is 4; there are 4 classes, so labels are 0 to 3",
        ),
        ({"classes": np.array(["caf\u00e9", "b", "c", "cafe\u0301"])}, "classes holds 'caf\u00e9' twice"),
        ({"classes": np.array(["ant", "bee"])}, r"train_labels\[2\] is 2; there are 2 classes"),
        ({"train_labels": np.zeros(0, int), "train_images": np.zeros((0, 6, 5), np.uint8)}, "test_labels|is empty"),
    ],
)
def test_faulty_array_is_named(tmp_path: Path, changes: dict[str, np.ndarray | None], match: str) -> None:
    refused(write(tmp_path / "a.npz", **changes), match)


def test_labels_that_no_image_has_are_not_even_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", train_labels=np.zeros(2**20, np.int8))
    refused(path, r"train_labels claims 10487\d\d bytes; at most 65632 are read")


class Payload:
    """Unpickling it creates the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_pickle_payload_is_refused_and_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    refused(write(tmp_path / "a.npz", train_labels=np.array([Payload(canary)] * 12)), "train_labels is damaged: Object")
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Payload(canary)))
    refused(tmp_path / "b.npz", "b.npz cannot be read as a zip file")
    assert not canary.exists()


@pytest.mark.parametrize("count", [10**10, 10**14, 10**30, -1])
def test_claimed_shape_is_refused_quickly(tmp_path: Path, count: int) -> None:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, 1, 1), }}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(100)
    path = write(tmp_path / "a.npz", train_images=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train_images.npy", content)
    refused(path, "train_images is damaged")


def test_truncated_and_missing_files_are_named(tmp_path: Path) -> None:
    refused(tmp_path / "none.npz", "none.npz is not a .npz file")
    refused(tmp_path, "is not a .npz file")
    path = write(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:300])
    refused(path, "a.npz cannot be read as a zip file")


def test_flipped_bits_are_refused_by_name_or_harmless(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz")
    whole = path.read_bytes()
    refusals = 0
    for _ in range(200):
        content = bytearray(whole)
        content[DRAW.integers(len(content))] ^= 1 << DRAW.integers(8)
        path.write_bytes(content)
        try:
            open_npz(path)
        except InputError as error:
            assert "a.npz" in str(error)
            refusals += 1
    assert refusals > 100


@pytest.mark.filterwarnings("ignore:Reading .*additional header parsing:UserWarning", "ignore:Data type alias")
def test_garbled_array_header_is_refused_by_name_or_harmless(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, ARRAYS["train_labels"])
    path = write(tmp_path / "a.npz", train_labels=None)
    whole = path.read_bytes()
    refusals = 0
    for _ in range(300):
        content = bytearray(buffer.getvalue())
        for position in DRAW.integers(6, 80, 2):
            content[position] = DRAW.choice(list(b"0123456789(){}[],:'<>|?UVOi -.L"))
        path.write_bytes(whole)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("train_labels.npy", content)
        try:
            open_npz(path)
        except InputError as error:
            assert "train_labels" in str(error)
            refusals += 1
    assert refusals > 150
