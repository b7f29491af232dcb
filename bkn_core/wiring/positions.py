"""Lines of functions that move values, or mix those of different positions."""

from __future__ import annotations

import dataclasses

from torch import Tensor
from torch.utils import _pytree as pytree

from bkn_core.wiring.listing import Listing
from bkn_core.wiring.operations import OVER_POSITIONS, REARRANGING
from bkn_core.wiring.values import Step, Value, find_channels, number_channels, tensors


def over_positions(listing: Listing, step: Step, value: Value) -> Value:
    """Pooling, padding or resizing."""
    rank = step.outputs[0].dim()
    acted = OVER_POSITIONS[step.name]
    if step.name == "pad":
        acted = len(step.argument(1, "pad")) // 2
    elif acted is None:
        acted = rank - 2
    if value.tensor is None or rank != value.tensor.dim() or value.dimension >= rank - acted:
        return Value(reason=f"{step.name} across channels")
    return listing.passed(value)


def mean(listing: Listing, step: Step, value: Value) -> Value:
    """The mean over positions."""
    dims = step.argument(1, "dim")
    assert value.tensor is not None
    if dims is None:
        return Value(reason="mean over everything")
    rank = value.tensor.dim()
    gone = {d % rank for d in ([dims] if isinstance(dims, int) else dims)}
    if value.dimension in gone or 0 in gone:
        return Value(reason="mean over channels or images")
    kept = step.argument(2, "keepdim") or False
    dimension = value.dimension - (0 if kept else sum(d < value.dimension for d in gone))
    return dataclasses.replace(listing.passed(value), dimension=dimension)


def concatenate(listing: Listing, step: Step, values: list[Value]) -> Value:
    """Tensors beside each other, along the channels or along something else."""
    dim = step.argument(1, "dim")
    assert values[0].tensor is not None
    dim = (0 if dim is None else dim) % values[0].tensor.dim()
    if len(values) != len(step.tensors):
        return Value(reason="cat with tensors that are not features")
    if all(v.dimension == dim for v in values):
        if len({v.line for v in values}) < len(values):
            return Value(reason="cat of the same features twice")  # far from independent
        channels = sum(listing.channels(v) for v in values)
        return listing.write("concatenate", [v.line for v in values], channels, dimension=dim)
    if len({(listing.before_passing(v.line), v.dimension) for v in values}) == 1:
        return listing.passed(values[0])
    return Value(reason="cat along another dimension than the channels")


def moved(listing: Listing, step: Step, value: Value) -> list[Value]:
    """Replay a function that only moves values on channel numbers and read off where each channel went."""
    args, kwargs = step.arguments
    count = len(step.outputs)
    if not args or args[0] is not value.tensor:
        return [Value(reason=f"{step.name} of something else than features")] * count
    if value.tensor.is_meta and any(not t.is_meta or step.name == "getitem" for t in tensors((args[1:], kwargs))):
        return [Value(reason=f"{step.name} by numbers that a meta tensor does not hold")] * count
    numbers = number_channels(value, listing.channels(value))
    results = pytree.tree_leaves(step.function(numbers, *args[1:], **kwargs))
    placed = [_placed(listing, value, result) for result in results if isinstance(result, Tensor)]
    return placed if step.name in REARRANGING else [_elsewhere(listing, value, result) for result in placed]


def _elsewhere(listing: Listing, before: Value, after: Value) -> Value:
    """Give values that were picked by position a line of their own."""
    return listing.passed(after) if after.line == before.line else after


def _placed(listing: Listing, value: Value, numbers: Tensor) -> Value:
    """Read off where a function put the channels of a value."""
    place = find_channels(numbers, listing.channels(value))
    if isinstance(place, str):
        return Value(reason=place)
    if place is None:
        return Value(line=value.line, numbers=numbers)
    dimension, index = place
    if index == tuple(range(listing.channels(value))):
        return Value(line=value.line, dimension=dimension)
    return listing.write("gather", [value.line], len(index), dimension=dimension, options=(index,))
