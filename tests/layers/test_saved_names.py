"""What a layer is saved under: checkpoints of other versions have the same names, whatever the code calls them."""

from __future__ import annotations

from typing import Any

import pytest

from bkn_core.layers.batch_kalman import BatchKalmanNorm2d

AFFINE = {"weight": (6,), "bias": (6,)}
MOVING = {"running_mean": (6,), "running_var": (6,), "num_batches_tracked": ()}
INFLATED = {
    "innovation": (6,),
    "mean_innovation": (6,),
    "sensitivity": (2, 6),
    "gathered_sensitivity": (3, 6),
    "residual": (2, 6),
    "uncertainty": (5,),
}
CORRECTED = {"prior_offset": (6,), "prior_log_scale": (6,)}
FACTOR = {"gain_factor": ()}
FIXED = {"fixed_gain": ()} | FACTOR
LEARNED = {"gain_logit": ()}

CASES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "plain": ({"gain": 1.0, "learn_gain": False}, AFFINE | MOVING | FIXED),
    "computed gain": ({"gain": "auto", "innovation": True}, AFFINE | MOVING | FIXED | INFLATED),
    "learned gain": ({"innovation": True}, AFFINE | LEARNED | MOVING | FACTOR | INFLATED),
    "correction": ({"correction": True}, AFFINE | LEARNED | CORRECTED | MOVING | FACTOR),
    "transition": (
        {"previous_features": 12},
        AFFINE | LEARNED | {"transition": (6, 12)} | MOVING | FACTOR,
    ),
    "bare": ({"affine": False, "track_running_stats": False}, LEARNED | FACTOR),
}


@pytest.mark.parametrize("case", CASES)
def test_names_shapes_and_order_of_what_is_saved(case: str) -> None:
    options, expected = CASES[case]
    saved = BatchKalmanNorm2d(6, **options).state_dict()
    assert [(name, tuple(tensor.shape)) for name, tensor in saved.items()] == list(expected.items())
