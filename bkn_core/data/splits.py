"""The data room: labelled images by name, decoded into memory or read on demand."""

from __future__ import annotations

import dataclasses
import difflib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bkn_core.data.arrays import open_digits, open_npz
from bkn_core.data.folders import open_image_folder, open_validation_folder
from bkn_core.data.image_sets import ImageSet, LazyImageSet
from bkn_core.data.mask_sets import MaskSet
from bkn_core.data.pictures import CHANNELS, PIXEL_LIMIT, Color, Fit
from bkn_core.data.preprocess import Preprocess, channel_statistics
from bkn_core.data.sources import PICTURE_CHUNK, Opened, PictureSource, Source, choose, hold_out
from bkn_core.data.torchvision_sets import NAMES, open_torchvision, unpacked
from bkn_core.errors import InputError, RecipeError
from bkn_core.recipe_sections import MASK_DATA, OWN_DATA

__all__ = ["DataSplits", "ImageSet", "Images", "LazyImageSet", "Preprocess", "load_data", "prefetch"]

# A split that takes more bytes than this when decoded is decoded batch by batch.
MEMORY_LIMIT = 2**32
# The images of one forward take no more than this as numbers.
FORWARD_LIMIT = 2**32
# The images that mean and std are taken from where a split is not held decoded.
STATISTICS_IMAGES, STATISTICS_BYTES = 10_000, 2**31


Images = ImageSet | LazyImageSet | MaskSet


@dataclass(frozen=True)
class DataSplits:
    """Training, test and, where they are held out, validation images of one size and colour, what makes them a model's
    input, and notes on what was left out or held out.
    """

    train: Images
    test: Images
    preprocess: Preprocess
    classes: tuple[str, ...]
    validation: Images | None = None
    notes: tuple[str, ...] = ()

    @property
    def deciding(self) -> Images:
        """The images that epochs are compared on: those held out for it, or else the test images."""
        return self.test if self.validation is None else self.validation


def load_data(
    name: str,
    *,
    root: str | Path,
    image_size: int | tuple[int, int] | None,
    resize: Fit = "stretch",
    train_images: int | None = None,
    test_images: int | None = None,
    validation: float | str | None = None,
    color: Color | None = None,
    download: bool = False,
    together: int = 1,
    workers: int | None = None,
) -> DataSplits:
    """Load a data set; mean and std of its `preprocess` are those of the chosen training images.

    Args:
        name: `digits`, `imagefolder`, `npz`, or a classification data set of torchvision by its class name.
        root: Folder, .zip or .npz file that the data lies in; not used by `digits`.
        image_size: Height and width, or one number for both; None takes the size of the first training image.
        resize: How pictures of another aspect are fitted: "stretch", "crop" or "pad".
        train_images: How many training images, equally many of each class as far as they go; the choice is fixed
            and made before anything is decoded. None takes all.
        test_images: The same for test images.
        validation: The images that choices are made on: a share of all training images, held out before
            `train_images` are chosen from the rest, in proportion to the classes and always the same ones; or, for
            `imagefolder`, the path of a folder of CLASS/*. None takes those that the data set apart, if any.
        color: "RGB" or "L"; None takes the natural one: "L" where all training images are grey.
        download: Let torchvision fetch what is missing.
        together: The most images that a forward will hold.
        workers: Threads that decode pictures where that is safe, which torchvision's data sets do not promise.

    Raises:
        RecipeError: There is no such data set, it has fewer images than asked for, or they are too large.
        InputError: A file is missing, damaged or not safe to read.
    """
    root = _home(root)
    train, test, held_out, notes, places = _open(name, root, download=download)
    has = f"{name} has {{}} training images"
    if isinstance(validation, str):
        _, _, held_out, more, _ = _open_validation(validation, name, places, train.classes)
        notes += more
    elif validation is not None:
        train, held_out = _hold_out(train, validation, name)
        has += " beside those of data.validation"
    train, test = (_with_workers(source, workers) for source in (train, test))
    held_out = held_out and _with_workers(held_out, workers)
    train = _subset(train, train_images, has, "data.train_images")
    test = _subset(test, test_images, f"{name} has {{}} test images", "data.test_images")
    color = color or train.color()
    if image_size is None:
        image_size = train.size()
        if isinstance(train, PictureSource) and train.has_several_sizes():
            notes += (
                f"pictures differ in size: all are taken to {image_size[0]} x {image_size[1]}, as the first is, "
                "without data.image_size",
            )
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    most = max(len(source.labels) for source in (train, test, held_out) if source is not None)
    _refuse_oversized(color, size, min(together, most))
    train_set = _image_set(train, color, size, resize)
    preprocess = Preprocess(color, size, *channel_statistics(_statistics_images(train_set)), resize=resize)
    validation_set = None if held_out is None else _image_set(held_out, color, size, resize)
    test_set = _image_set(test, color, size, resize)
    return DataSplits(train_set, test_set, preprocess, train.classes, validation_set, notes)


def load_test_images(
    name: str, *, root: str | Path, preprocess: Preprocess, test_images: int | None = None, download: bool = False
) -> tuple[Images, tuple[str, ...]]:
    """Load the test images alone, in the colour and size that a trained model wants, and notes on them.

    Raises:
        InputError, RecipeError: as `load_data`.
    """
    _refuse_oversized(preprocess.color, preprocess.image_size, 1)
    opened = _open(name, _home(root), download=download)
    test = _subset(opened.test, test_images, f"{name} has {{}} test images", "data.test_images")
    return _image_set(test, preprocess.color, preprocess.image_size, preprocess.resize), opened.notes


def prefetch(images: Images, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batch at each of the given indices, decoding those that follow while the caller works on this one."""
    if not isinstance(images, LazyImageSet):
        yield from map(images.batch, batches)
        return
    # As many batches at once as keep the threads of the source busy: a small one has work for one thread.
    threads = images.source.threads if isinstance(images.source, PictureSource) else 1
    ahead = max(1, threads // max(1, -(-max(map(len, batches), default=1) // PICTURE_CHUNK)))
    waiting: deque[Future[tuple[Tensor, Tensor]]] = deque()
    with ThreadPoolExecutor(ahead) as readers:
        for indices in batches:
            waiting.append(readers.submit(images.batch, indices))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _with_workers(source: Source, workers: int | None) -> Source:
    if workers is None or not isinstance(source, PictureSource) or source.threads == 1:
        return source
    return dataclasses.replace(source, threads=workers)


def _home(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~nobody/photos
        raise InputError(f"the path {path} begins with a home folder that is not known", "Write it out.") from error


def _refuse_oversized(color: Color, image_size: tuple[int, int], together: int) -> None:
    height, width = image_size
    what = f"images of {height} x {width} pixels"
    if height * width > PIXEL_LIMIT:
        raise RecipeError(f"{what} are too large; at most {PIXEL_LIMIT} pixels are taken", "Lower data.image_size.")
    size = 4 * together * CHANNELS[color] * height * width
    if size > FORWARD_LIMIT:
        raise RecipeError(
            f"{together} {what} in one forward take {size} bytes; at most {FORWARD_LIMIT} are taken",
            "Lower data.image_size, or both batch.per_device and eval.batch_size.",
        )


def _open(name: str, root: Path, *, download: bool) -> Opened:
    if name == "digits":
        return Opened(*open_digits())
    if name == "imagefolder":
        place = unpacked(root)
        return open_image_folder(root) if place is None else Opened(*open_torchvision(*place, download=False))
    if name == "npz":
        return Opened(*open_npz(root))
    if name in MASK_DATA:
        raise RecipeError(f"data.name is {name}, which has masks, but task is classification", "Set task=segmentation.")
    if name in NAMES:
        return Opened(*open_torchvision(name, root, download=download))
    known = {allowed.lower(): allowed for allowed in (*OWN_DATA, *NAMES)}
    nearest = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"Did you mean '{known[nearest[0]]}'?" if nearest else ""
    raise RecipeError(f"data.name is '{name}'; choose one of {', '.join(known.values())}", hint)


def _open_validation(path: str, name: str, places: Mapping[str, Path], classes: tuple[str, ...]) -> Opened:
    if name != "imagefolder":
        raise RecipeError(
            f"data.validation is {path!r}, a folder, but data.name is {name}; only imagefolder takes one",
            "Give a share of the training images, such as 0.1.",
        )
    return open_validation_folder(_home(path), places, classes)


def _hold_out(train: Source, share: float, name: str) -> tuple[Source, Source]:
    available = len(train.labels)
    count = round(share * available)
    if not 1 <= count < available:
        raise RecipeError(
            f"data.validation is {share}: of the {available} training images of {name} these are {count}",
            "Give a share that holds out at least one image and leaves one.",
        )
    return hold_out(train, count)


def _subset(source: Source, count: int | None, has: str, key: str) -> Source:
    available = len(source.labels)
    if not available:
        raise InputError(has.format("no"))
    if count is None or count == available:
        return source
    if not 1 <= count <= available:
        raise RecipeError(
            f"{key} is {count}, but {has.format(available)}", f"Choose 1 to {available}, or null for all."
        )
    return source.take(choose(source.labels, count))


def _statistics_images(images: ImageSet | LazyImageSet) -> Tensor:
    if isinstance(images, ImageSet):
        return images.images
    height, width = images.image_size
    count = min(STATISTICS_IMAGES, STATISTICS_BYTES // (CHANNELS[images.color] * height * width), len(images))
    return images.batch(choose(images.labels, count, proportional=True))[0]


def _image_set(source: Source, color: Color, image_size: tuple[int, int], fit: Fit) -> ImageSet | LazyImageSet:
    height, width = image_size
    if len(source.labels) * CHANNELS[color] * height * width > MEMORY_LIMIT:
        return LazyImageSet(source, color, image_size, fit)
    everything = torch.arange(len(source.labels))
    return ImageSet(source.read(everything, color, image_size, fit), source.labels, source.classes, source.names())
