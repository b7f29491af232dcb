"""Image folders and zip files, sound, damaged and hostile."""

import io
import os
import re
import shutil
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bkn_core.data import trees
from bkn_core.data.folders import open_image_folder
from bkn_core.data.sources import Source
from bkn_core.errors import InputError

TREE = {
    f"{split}/{name}/{index}.png": (index * 20 + len(split)) % 256
    for split, count in (("train", 6), ("val", 3))
    for name in ("cat", "dog")
    for index in range(count)
}


def picture(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (grey, 0, grey)).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(root: Path) -> Path:
    for path, grey in TREE.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(picture(grey))
    return root


def write_zip(path: Path, prefix: str = "", extra: tuple[tuple[str | zipfile.ZipInfo, bytes], ...] = ()) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, grey in TREE.items():
            archive.writestr(prefix + name, picture(grey))
        for entry, content in extra:
            archive.writestr(entry, content)
    return path


def opened(root: Path) -> tuple[Source, Source]:
    found = open_image_folder(root)
    return found.train, found.test


def refused(root: Path, match: str) -> None:
    """Opening or reading everything under the root is refused, within a second."""
    start = time.perf_counter()
    with pytest.raises(InputError, match=match):
        for source in opened(root):
            source.read(torch.arange(len(source.labels)), "RGB", (4, 4))
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("kind", ["folder", "zip", "enclosed", "backslashes"])
def test_folder_and_zip_give_the_same_images(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        root = write_folder(tmp_path / "data")
        (root / "train" / ".hidden").mkdir()
        (root / "train" / "cat" / "._0.png").write_bytes(b"")
        (root / "train" / "cat" / "notes.txt").write_bytes(b"")
    else:
        junk = (("README", b""), ("__MACOSX/train/cat/._0.png", b""), ("__MACOSX/x/y.png", b""))
        root = write_zip(tmp_path / "data.zip", "outer/" if kind == "enclosed" else "", junk)
    if kind == "backslashes":
        root.write_bytes(root.read_bytes().replace(b"train/cat/", b"train\\cat\\"))
    train, test = opened(root)
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.tolist() == [0] * 6 + [1] * 6
    assert test.labels.tolist() == [0] * 3 + [1] * 3
    images = train.read(torch.arange(12), "RGB", (5, 6))
    assert images[:, 0, 0, 0].tolist() == [index * 20 + 5 for index in range(6)] * 2
    assert images[:, 1].max() == 0


def test_test_split_goes_before_val(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    for name in ("cat", "dog"):
        (root / "test" / name).mkdir(parents=True)
        (root / "test" / name / "0.png").write_bytes(picture(0))
    assert len(open_image_folder(root)[1].labels) == 2


def test_suffixes_count_in_any_case(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    (root / "train/cat/0.png").rename(root / "train/cat/0.PNG")
    assert len(open_image_folder(root)[0].labels) == 12


def test_missing_root_split_and_class_are_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere does not exist")
    root = write_folder(tmp_path / "data")
    (root / "val" / "dog").rename(root / "val" / "cow")
    refused(root, "class 'dog' is in train but not in val")
    (root / "train").rename(root / "training")
    refused(root, "data has no train folder, but training, val")
    (root / "val").rename(root / "testing")
    refused(root, "data has no train folder, but testing, training")
    shutil.rmtree(root / "training")
    (root / "testing").rename(root / "train")
    shutil.rmtree(root / "train" / "cow")
    refused(root, "data/train has 1 class folder; there are to be two or more")


def test_a_relative_root_is_said_with_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(Path("nowhere"), rf"data.root nowhere \(in {re.escape(str(tmp_path))}\) does not exist\nName the place")


def test_empty_class_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    for split in ("train", "val"):
        (root / split / "ape").mkdir()
    refused(root, "class folder .*/train/ape holds no images")
    archive = write_zip(tmp_path / "data.zip", extra=(("train/ape/", b""), ("val/ape/", b"")))
    refused(archive, "class folder .*/train/ape holds no images")


def test_unreadable_and_truncated_files_are_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    (root / "train/dog/2.png").write_bytes(picture(0)[:40])
    refused(root, "train/dog/2.png cannot be decoded")
    (root / "train/dog/2.png").unlink()
    (root / "train/dog/2.png").symlink_to(root / "train/dog/none.png")
    refused(root, "train/dog/2.png is not a regular file")


def test_file_that_vanishes_after_listing_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    train, _ = opened(root)
    (root / "train/dog/2.png").unlink()
    with pytest.raises(InputError, match=r"train/dog/2.png cannot be read: No such file"):
        train.read(torch.arange(12), "RGB", (4, 4))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    os.mkfifo(root / "train/dog/pipe.png")
    refused(root, "pipe.png is not a regular file")


def test_link_out_of_the_root_is_refused_and_one_within_is_read(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    (root / "train/cat/link.png").symlink_to(root / "train/dog/0.png")
    assert len(open_image_folder(root)[0].labels) == 13
    (tmp_path / "secret.png").write_bytes(picture(9))
    (root / "train/dog/link.png").symlink_to(tmp_path / "secret.png")
    refused(root, "dog/link.png is a symbolic link out of")


def test_huge_file_is_refused_unread(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    with (root / "train/cat/big.png").open("wb") as file:
        file.truncate(10 * 2**30)
    refused(root, "cat/big.png has 10737418240 bytes; at most")


def link_entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o120777 << 16
    return entry


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ("../escaped.png", r"'\.\./escaped.png' points outside"),
        ("train/cat/../../../x.png", "points outside"),
        ("/train/cat/absolute.png", "points outside"),
        ("train\\..\\..\\x.png", "points outside"),
        (link_entry("train/cat/link.png"), "'train/cat/link.png' is a symbolic link"),
    ],
)
def test_hostile_zip_entry_is_refused(tmp_path: Path, entry: str | zipfile.ZipInfo, match: str) -> None:
    refused(write_zip(tmp_path / "data.zip", extra=((entry, picture(0)),)), match)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_without_a_bound_is_refused(tmp_path: Path, method: int) -> None:
    entry = zipfile.ZipInfo("train/cat/bomb.png")
    entry.compress_type = method
    refused(write_zip(tmp_path / "data.zip", extra=((entry, b"0" * 100),)), "bomb.png' is compressed with method")


def patch_directory(path: Path, name: bytes, offset: int, value: bytes) -> None:
    """Overwrite a field of the central directory record of an entry."""
    content = bytearray(path.read_bytes())
    start = content.rindex(name) - 46  # the fixed part of the record
    assert content[start : start + 4] == b"PK\x01\x02"
    content[start + offset : start + offset + len(value)] = value
    path.write_bytes(content)


def test_claimed_entry_size_is_not_believed(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "data.zip")
    patch_directory(path, b"train/cat/3.png", 24, struct.pack("<I", 2**32 - 2))
    refused(path, "'train/cat/3.png' claims 4294967294 bytes")


def test_encrypted_entry_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "data.zip")
    patch_directory(path, b"train/cat/3.png", 8, struct.pack("<H", 1))
    refused(path, "'train/cat/3.png' is encrypted")


def test_zip_bomb_is_read_no_further_than_it_claims(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "data.zip", extra=(("train/cat/bomb.png", bytes(2**24)),))
    patch_directory(path, b"train/cat/bomb.png", 24, struct.pack("<I", 100))
    refused(path, r"train/cat/bomb.png")


def test_entry_of_almost_nothing_but_zeros_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "data.zip", extra=(("train/cat/bomb.png", bytes(2**26 + 1)),))
    refused(path, r"'train/cat/bomb.png' claims 67108865 bytes, from \d+ in the file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_root_that_is_neither_folder_nor_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for root in (tmp_path / "pipe", Path("/dev/zero")):
        refused(root, "is no zip file: it is not a regular file")


def test_root_whose_name_is_too_long_does_not_exist(tmp_path: Path) -> None:
    refused(tmp_path / ("x" * 5000), "does not exist")


@pytest.mark.parametrize("name", ["train/cat", "train/cat/loop.png", "train/loop"])
def test_link_to_itself_is_named(tmp_path: Path, name: str) -> None:
    root = write_folder(tmp_path / "data")
    link = root / name
    shutil.rmtree(link, ignore_errors=True)
    link.symlink_to(link.name)
    refused(root, name)


def test_damaged_zip_names_the_file(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "data.zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "data.zip cannot be read as a zip file")
    path.write_bytes(b"no zip at all")
    refused(path, "data.zip cannot be read as a zip file")
    start = whole.index(b"train/dog/1.png") + 20
    path.write_bytes(whole[:start] + bytes(20) + whole[start + 20 :])
    refused(path, "'train/dog/1.png' is damaged")


def test_flipped_bits_in_a_zip_are_refused_or_harmless(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "data.zip")
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    refusals = 0
    for _ in range(100):
        content = bytearray(whole)
        content[draw.integers(len(content))] ^= 1 << draw.integers(8)
        path.write_bytes(content)
        try:
            for source in opened(path):
                source.read(torch.arange(len(source.labels)), "RGB", (4, 4))
        except InputError as error:
            assert "data.zip" in str(error)
            refusals += 1
    assert refusals > 50


def test_picture_bytes_beyond_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "BYTE_LIMIT", 60)
    refused(write_zip(tmp_path / "data.zip"), "at most 60 are read")
