"""What the layers refuse, and how they print."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bkn_core.errors import ConversionError
from bkn_core.layers.batch_kalman import (
    BatchKalmanNorm,
    BatchKalmanNorm1d,
    BatchKalmanNorm2d,
    BatchKalmanNorm3d,
)


@pytest.mark.parametrize("gain", [-0.1, 1.1, float("nan")])
def test_gain_outside_the_unit_interval_is_refused(gain: float) -> None:
    with pytest.raises(ConversionError, match=f"gain is {gain}"):
        BatchKalmanNorm2d(3, gain=gain, learn_gain=False)


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_learned_gain_may_not_start_at_an_end(gain: float) -> None:
    with pytest.raises(ConversionError, match="learn_gain=False"):
        BatchKalmanNorm2d(3, gain=gain)


@pytest.mark.parametrize(
    "options", [{"statistics_batch_size": 0}, {"statistics_batch_size": -1}, {"covariance": "half"}]
)
def test_other_bad_arguments_are_refused_by_name(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConversionError, match=name):
        BatchKalmanNorm2d(3, **options)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(BatchKalmanNorm1d, (2, 3, 4, 4)), (BatchKalmanNorm2d, (2, 3)), (BatchKalmanNorm3d, (2, 3, 4, 4))],
)
def test_wrong_dimensions_are_refused_as_by_batch_norm(layer: type[BatchKalmanNorm], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"{len(shape)}-D input"):
        layer(3)(torch.randn(shape))


def test_wrong_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="5 channels"):
        BatchKalmanNorm2d(5)(torch.randn(2, 4, 3, 3))
    with pytest.raises(ValueError, match="5 channels"):
        BatchKalmanNorm2d(5).eval()(torch.randn(2, 4, 3, 3))
