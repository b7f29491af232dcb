"""Trees as users have them: what is read of them, what is left out and said, what is held out."""

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from bkn_core.data.folders import open_image_folder
from bkn_core.data.pictures import FORMATS
from bkn_core.data.splits import load_data
from bkn_core.errors import InputError

Pack = Callable[..., Path]
COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def write(root: Path, *paths: str) -> Path:
    """Write a picture, or something else, at each path; `{3}` stands for three of them."""
    for path in paths:
        head, _, rest = path.partition("{")
        count, _, tail = rest.partition("}")
        for place in [root / f"{head}{i}{tail}" for i in range(int(count))] if rest else [root / path]:
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (9, 9, 9)).save(place, "PNG")
    return root


@pytest.fixture(params=["folder", "zip"])
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Pack:
    """Returns what the root of some paths is: their folder, or a zip file of it."""

    def pack(*paths: str) -> Path:
        folder = write(tmp_path / "photos", *paths)
        return Path(shutil.make_archive(str(folder), "zip", folder)) if request.param == "zip" else folder

    return pack


def test_pictures_are_read_at_any_depth(packed: Pack) -> None:
    root = packed(
        "train/cat/{2}.png",
        "train/cat/more/{3}.png",
        "train/cat/a/b/c/{1}.png",
        "train/dog/{4}.png",
        "test/cat/0.png",
        "test/dog/0.png",
    )
    opened = open_image_folder(root)
    assert opened.train.labels.tolist() == [0] * 6 + [1] * 4
    assert opened.train.read(torch.arange(10), "RGB", (4, 4)).eq(9).all()
    assert opened.notes == ()


def test_what_pillow_writes_under_its_usual_names_is_read(tmp_path: Path) -> None:
    root = write(tmp_path, "train/cat/0.png", "train/dog/0.png", "test/cat/0.png", "test/dog/0.png")
    suffixes = {
        "tif": "TIFF",
        "tiff": "TIFF",
        "gif": "GIF",
        "jfif": "JPEG",
        "avif": "AVIF",
        "jp2": "JPEG2000",
        "JPE": "JPEG",
    }
    for suffix, kind in suffixes.items():
        Image.new("RGB", (4, 4), (200, 200, 200)).save(root / "train" / "cat" / f"x.{suffix}", kind)
    assert set(suffixes.values()) <= set(FORMATS)
    opened = open_image_folder(root)
    assert opened.train.labels.tolist() == [0] * 8 + [1]
    read = opened.train.read(torch.arange(8), "RGB", (4, 4))
    assert (read[1:] > 190).all()
    assert opened.notes == ()


def test_what_is_left_out_is_counted_and_named(packed: Pack) -> None:
    root = packed(
        "train/cat/{2}.png",
        "train/cat/{3}.heic",
        "train/dog/{2}.png",
        "train/dog/sub/labels.TXT",
        "train/{2}.png",
        "test/cat/0.png",
        "test/dog/0.png",
        "stray.png",
        "extra/0.png",
        ".hidden/0.png",
        "train/cat/.0.png",
    )
    assert open_image_folder(root).notes == (
        f"{root}: left out are 3 .heic, 1 .txt (no format that is read), such as train/cat/0.heic, train/cat/1.heic, "
        "train/cat/2.heic; 3 pictures in no class folder: stray.png, train/0.png, train/1.png; "
        "the folders extra (neither training nor test images)",
    )


def test_a_class_without_a_picture_that_is_read_is_refused(packed: Pack) -> None:
    root = packed("train/cat/0.png", "train/dog/0.heic", "test/cat/0.png", "test/dog/0.png")
    with pytest.raises(InputError, match=r"class folder .*photos(\.zip)?/train/dog holds no images"):
        open_image_folder(root)


def test_one_class_in_two_spellings_of_unicode_is_one(packed: Pack) -> None:
    root = packed(
        f"train/{DECOMPOSED}/a{{2}}.png",
        f"train/{COMPOSED}/b{{1}}.png",
        "train/tea/0.png",
        f"test/{COMPOSED}/0.png",
        "test/tea/0.png",
    )
    opened = open_image_folder(root)
    assert opened.train.classes == opened.test.classes == (COMPOSED, "tea")
    assert opened.train.labels.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
def test_validation_images_beside_train_and_test_are_used_as_such(packed: Pack, name: str) -> None:
    root = packed(
        "Train/cat/{3}.png",
        "Train/dog/{3}.png",
        "TEST/cat/0.png",
        "TEST/dog/0.png",
        f"{name}/cat/{{2}}.png",
        f"{name}/dog/{{2}}.png",
    )
    splits = load_data("imagefolder", root=root, image_size=None)
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (6, 4, 2)
    assert splits.deciding is splits.validation
    share = load_data("imagefolder", root=root, image_size=None, validation=0.34)
    assert share.validation is not None
    assert (len(share.train), len(share.validation)) == (4, 2)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_without_test_they_are_the_test_images(packed: Pack, name: str) -> None:
    root = packed("train/cat/{3}.png", "train/dog/{3}.png", f"{name}/cat/{{2}}.png", f"{name}/dog/{{2}}.png")
    splits = load_data("imagefolder", root=root, image_size=None)
    assert (len(splits.train), len(splits.test), splits.validation) == (6, 4, None)


def test_two_folders_of_validation_images_are_refused(packed: Pack) -> None:
    root = packed(*(f"{split}/{name}/0.png" for split in ("train", "test", "val", "valid") for name in ("cat", "dog")))
    with pytest.raises(InputError, match=r"photos(\.zip)? has both val and valid"):
        open_image_folder(root)


@pytest.mark.parametrize("top", ["", "train/", "outer/"])
def test_a_fifth_is_held_out_where_there_are_no_test_images(packed: Pack, top: str) -> None:
    root = packed(f"{top}cat/{{20}}.png", f"{top}dog/sub/{{10}}.png")
    first, again = (load_data("imagefolder", root=root, image_size=None) for _ in range(2))
    assert first.train.labels.bincount().tolist() == [16, 8]
    assert first.test.labels.bincount().tolist() == [4, 2]
    one, other = (open_image_folder(root) for _ in range(2))
    assert one.test.digest() == other.test.digest() != one.train.digest()
    assert again.notes == (
        f"{root} has no folder of test images: 6 of its 30 images, in proportion to the classes and always the same, "
        "are held out for it",
    )


def test_a_link_to_a_folder_around_it_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "photos", "train/cat/0.png", "train/dog/0.png", "test/cat/0.png", "test/dog/0.png")
    (root / "train" / "cat" / "again").symlink_to(root / "train")
    with pytest.raises(InputError, match="cat/again is a symbolic link to a folder that it lies in"):
        open_image_folder(root)


def test_an_entry_that_a_zip_file_holds_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "photos.zip"
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "PNG")
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("train/cat/0.png", "train/dog/0.png", "test/cat/0.png", "test/dog/0.png", "train\\cat/0.png"):
            archive.writestr(name, content.getvalue())
    with pytest.raises(InputError, match=r"photos.zip has the entry 'train/cat/0.png' twice"):
        open_image_folder(path)


@pytest.mark.parametrize("image_size", [None, 6])
def test_pictures_of_several_sizes_are_said_where_none_was_asked_for(tmp_path: Path, image_size: int | None) -> None:
    root = write(tmp_path, "train/cat/{2}.png", "train/dog/{2}.png", "test/cat/0.png", "test/dog/0.png")
    assert load_data("imagefolder", root=root, image_size=image_size).notes == ()
    Image.new("RGB", (5, 4)).save(root / "train/dog/1.png")
    notes = load_data("imagefolder", root=root, image_size=image_size).notes
    assert [("differ in size" in note, "to 4 x 4" in note) for note in notes] == ([] if image_size else [(True, True)])
