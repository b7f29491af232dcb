"""Preprocessing as plain data, and the statistics in it."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from bkn_core.data.preprocess import Preprocess, channel_statistics
from bkn_core.errors import InputError

COLOUR: dict[str, Any] = {
    "color": "RGB",
    "image_size": [16, 12],
    "interpolation": "bilinear",
    "antialias": True,
    "resize": "crop",
    "scale": 255,
    "mean": [0.4914, 0.4822, 0.4465],
    "std": [0.247, 0.2435, 0.2616],
}


def test_json_object_goes_there_and_back() -> None:
    preprocess = Preprocess.from_dict(json.loads(json.dumps(COLOUR)))
    assert preprocess.image_size == (16, 12)
    assert preprocess.to_dict() == COLOUR
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess
    assert hash(preprocess) == hash(Preprocess.from_dict(COLOUR))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("color", "BGR"),
        ("color", ["RGB"]),
        ("image_size", [16]),
        ("image_size", [16, 0]),
        ("image_size", [16.0, 12]),
        ("image_size", 16),
        ("interpolation", "nearest"),
        ("antialias", False),
        ("resize", "squeeze"),
        ("resize", ["crop"]),
        ("scale", 0),
        ("scale", "255"),
        ("mean", [0.5]),
        ("mean", [0.5, 0.5, float("nan")]),
        ("mean", [0.5, 0.5, None]),
        ("std", [0.5, 0.5, 0.0]),
    ],
)
def test_value_that_cannot_be_carried_out_is_refused(key: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"preprocess\.{key} is .*; allowed is "):
        Preprocess.from_dict({**COLOUR, key: value})


def test_missing_and_unknown_keys_are_refused() -> None:
    with pytest.raises(InputError, match="preprocess has the keys"):
        Preprocess.from_dict({key: value for key, value in COLOUR.items() if key != "mean"})
    with pytest.raises(InputError, match="'crop'"):
        Preprocess.from_dict({**COLOUR, "crop": 8})


def test_a_file_of_before_pictures_could_keep_their_aspect_stretches_them() -> None:
    assert Preprocess.from_dict({key: value for key, value in COLOUR.items() if key != "resize"}).resize == "stretch"


@pytest.mark.parametrize("channels", [1, 3])
def test_statistics_are_those_of_float64_to_four_decimals(channels: int) -> None:
    images = np.random.default_rng(0).binomial(255, 0.3, (5000, channels, 7, 6)).astype(np.uint8)
    mean, std = channel_statistics(torch.from_numpy(images))
    assert mean == tuple(np.round((images / 255).mean((0, 2, 3)), 4))
    assert std == tuple(np.round((images / 255).std((0, 2, 3)), 4))


def test_constant_channel_has_a_deviation_of_one_grey_level() -> None:
    assert channel_statistics(torch.full((4, 1, 5, 5), 51, dtype=torch.uint8)) == ((0.2,), (0.0039,))
