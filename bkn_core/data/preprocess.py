"""How a picture becomes a model's input, as plain data that travels with the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from torch import Tensor

from bkn_core.data.pictures import CHANNELS, Color, Fit
from bkn_core.errors import InputError

SCALE = 255
DECIMALS = 4
# A channel that varies by less than one grey level counts as varying by one.
SMALLEST_STD = round(1 / SCALE, DECIMALS)
CHUNK = 4096
LARGEST_IMAGE = 2**24
SMALLEST, LARGEST = 1e-6, 1e6  # of numbers that pictures are divided by, or moved


@dataclass(frozen=True)
class Preprocess:
    """What is done to a picture: colour, bilinear antialiased resize, then (x / scale - mean) / std per channel.

    `resize` is what becomes of another aspect than that of `image_size`: "stretch", "crop" or "pad".
    """

    color: Color
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    antialias: bool = True
    scale: int = SCALE
    resize: Fit = "stretch"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that run folders and ONNX files carry."""
        return {
            "color": self.color,
            "image_size": list(self.image_size),
            "interpolation": self.interpolation,
            "antialias": self.antialias,
            "resize": self.resize,
            "scale": self.scale,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """Read the JSON object back.

        Raises:
            InputError: A key is missing or unknown, or its value is none that this library can carry out.
        """
        values = {"resize": "stretch", **values}  # files of before there was another way do not say it
        expected = {field.name for field in fields(cls)}
        if set(values) != expected:
            raise InputError(f"preprocess has the keys {sorted(values)}; expected are {sorted(expected)}")
        for key, allowed in _faults(values).items():
            raise InputError(f"preprocess.{key} is {values[key]!r:.80}; allowed is {allowed}")
        lists = {key: tuple(values[key]) for key in ("image_size", "mean", "std")}
        return cls(**{**values, **lists})


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images, after division by the scale, to four decimals.

    They are counted, not accumulated: the same on every machine.
    """
    counts = torch.zeros((images.shape[1], 256), dtype=torch.float64)
    for chunk in torch.split(images, CHUNK):
        counts += torch.stack([channel.flatten().bincount(minlength=256) for channel in chunk.unbind(1)])
    weights = counts / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / SCALE
    mean = weights @ levels
    variance = (weights * (levels - mean[:, None]).square()).sum(1)
    deviations = [max(round(math.sqrt(value), DECIMALS), SMALLEST_STD) for value in variance.tolist()]
    return tuple(round(value, DECIMALS) for value in mean.tolist()), tuple(deviations)


def _faults(values: Mapping[str, Any]) -> dict[str, str]:
    """What is allowed, for each key whose value is not."""
    if values["color"] not in tuple(CHANNELS):  # a tuple can be asked about any JSON value
        return {"color": " or ".join(CHANNELS)}
    channels = CHANNELS[values["color"]]
    size, mean, std = values["image_size"], values["mean"], values["std"]
    tests = {
        "image_size": (_is_size(size), f"[height, width] of at most {LARGEST_IMAGE} pixels"),
        "interpolation": (values["interpolation"] == "bilinear", "'bilinear'"),
        "antialias": (values["antialias"] is True, "true"),
        "resize": (values["resize"] in get_args(Fit), " or ".join(get_args(Fit))),
        "scale": (_numbers([values["scale"]], 1) and values["scale"] >= SMALLEST, f"a number of at least {SMALLEST}"),
        "mean": (_numbers(mean, channels), f"{channels} numbers"),
        "std": (_numbers(std, channels) and min(std) >= SMALLEST, f"{channels} numbers of at least {SMALLEST}"),
    }
    return {key: allowed for key, (passed, allowed) in tests.items() if not passed}


def _is_size(value: object) -> bool:
    numbers = _numbers(value, 2) and all(type(number) is int and number > 0 for number in value)  # type: ignore[attr-defined]
    return numbers and math.prod(value) <= LARGEST_IMAGE  # type: ignore[call-overload]


def _numbers(values: object, count: int) -> bool:
    if not isinstance(values, (list, tuple)) or len(values) != count:
        return False
    return all(type(value) in (int, float) and abs(value) <= LARGEST for value in values)
