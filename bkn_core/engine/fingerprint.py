"""What data a run trains on, in few words, so that it does not go on with other data."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import PIL
import torch
import torchvision

from bkn_core.data.mask_sets import MaskSet
from bkn_core.data.sources import composed, tensor_digest
from bkn_core.data.splits import DataSplits, Images, LazyImageSet
from bkn_core.errors import InputError

_NAMES = 5  # classes that a message names


def fingerprint(splits: DataSplits) -> dict[str, Any]:
    """Return the classes of some data, and of each part the number of images and digests of labels and content.

    The content is the pixels of images that are held in memory, else the paths and sizes of the files, and in a zip
    file their checksums; not the place of the data, nor the times of its files.
    """
    parts = {"training": splits.train, "test": splits.test, "validation": splits.validation}
    described = {name: _describe(images) for name, images in parts.items() if images is not None}
    return {"classes": list(splits.classes), **described}


def check_data(saved: dict[str, Any], found: dict[str, Any]) -> None:
    """Refuse to go on with other data than a state was saved with.

    Raises:
        InputError: saying what changed.
    """
    if saved.keys() != found.keys():
        before, now = (", ".join(name for name in facts if name != "classes") for facts in (saved, found))
        raise InputError(
            f"the saved state is of other parts of the data than there are: {before} then, {now} now",
            "Put the data back as it was, such as without a folder val (earlier versions left it out), or train anew.",
        )
    changes = [*_class_changes(*([*map(composed, facts["classes"])] for facts in (saved, found)))]
    changes += [change for name in found if name != "classes" for change in _changes(name, saved[name], found[name])]
    if changes:
        raise InputError(
            f"the data is not what the run was trained on: {'; '.join(changes)}",
            "Put the data back as it was, or train anew with another --out.",
        )


def _describe(images: Images) -> dict[str, Any]:
    if isinstance(images, MaskSet):
        masks, pictures = images.digests()
        return {"images": len(images), "labels": masks, f"pixels by {_decoder()}": pictures}
    facts = {"images": len(images), "labels": tensor_digest(images.labels)}
    if isinstance(images, LazyImageSet):
        return {**facts, "files": images.source.digest()}
    return {**facts, f"pixels by {_decoder()}": tensor_digest(images.images)}


def _decoder() -> str:
    # Other decoders may round otherwise: under another name, what they give is not compared.
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"Pillow {PIL.__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}, {machine}"


def _class_changes(before: list[str], now: list[str]) -> Iterator[str]:
    gone, new = (sorted(set(one) - set(other)) for one, other in ((before, now), (now, before)))
    if gone or new:
        yield f"classes gone: {_some(gone)}, new: {_some(new)}"
    elif before != now:
        yield "the classes have another order"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMES]) + (f" and {len(names) - _NAMES} more" if len(names) > _NAMES else "") or "none"


def _changes(part: str, before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if before.get("images") != now["images"]:
        yield f"{now['images']} {part} images, there were {before.get('images')}"
    elif before.get("labels") != now["labels"]:
        yield f"other labels of the {part} images"
    elif any(before[key] != now[key] for key in before.keys() & now.keys()):
        yield f"other content of the {part} images"
