"""Attention averages features over positions with weights that sum to one: their mean stays."""

from __future__ import annotations

from torch import Tensor

from bkn_core.wiring.listing import Listing
from bkn_core.wiring.operations import IDENTITY, MATRIX_PRODUCTS, SHAPE_ONLY
from bkn_core.wiring.positions import moved_numbers, placed
from bkn_core.wiring.values import Step, Value, find_channels, number_channels


def weights(step: Step) -> Value | None:
    """Return the value of weights that sum to one along a dimension, or None: softmax, and what only moves it."""
    if not step.operands or step.operands[0] is None:
        return None
    if step.name == "softmax":
        dim = step.argument(1, "dim")
        rank = step.outputs[0].dim()
        return None if dim is None else Value(reason="softmax has no rule", sums_to_one=int(dim) % rank)
    given = step.operands[0]
    if given.sums_to_one < 0 or given.tensor is None:
        return None
    if step.name in IDENTITY:
        return given
    if step.name not in SHAPE_ONLY or len(step.outputs) != 1:
        return None
    count = given.tensor.shape[given.sums_to_one]
    numbers = moved_numbers(
        step, given, number_channels(Value(dimension=given.sums_to_one, tensor=given.tensor), count)
    )
    place = find_channels(numbers[0], count) if numbers and count > 1 else None
    if isinstance(place, tuple) and place[1] == tuple(range(count)):
        return Value(reason=given.reason, sums_to_one=place[0])
    return None


def average(listing: Listing, step: Step) -> Value | None:
    """Return the value of features averaged with such weights, or None where this is something else."""
    if step.name == "scaled_dot_product_attention":
        features, contracted = step.known(step.argument(2, "value")), -2
    elif step.name in MATRIX_PRODUCTS and len(step.operands) == 2:
        left, right = step.operands
        rank = step.outputs[0].dim()
        if left is not None and left.sums_to_one == rank - 1:
            features, contracted = right, -2
        elif right is not None and right.sums_to_one == rank - 2:
            features, contracted = left, -1
        else:
            return None
    else:
        return None
    if features is None or features.line < 0 or features.tensor is None:
        return None
    numbers = number_channels(features, listing.channels(features))
    if numbers.dim() != step.outputs[0].dim() or bool((numbers.diff(dim=contracted) != 0).any()):
        return Value(reason="attention across channels")
    result = placed(listing, features, _spread(numbers, contracted, step.outputs[0]))
    return listing.averaged(result, features.tensor.shape[contracted])


def _spread(numbers: Tensor, dim: int, output: Tensor) -> Tensor:
    return numbers.narrow(dim, 0, 1).expand(output.shape).contiguous()
