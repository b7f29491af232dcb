"""Functions that only move values: along dimensions, and tensors beside each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bkn_core.filter import propagate
from bkn_core.filter.kalman import Gaussian
from bkn_core.graph import instructions as op
from bkn_core.graph.graph import GraphBuilder, Node
from bkn_core.graph.instructions import ProgramBuilder, Slot
from bkn_core.graph.rules.rule import Rule, unsaid
from bkn_core.graph.values import Step, Value, find_channels, names, number_channels, tensors

# Functions that only move values. They are replayed on channel numbers, so no table of layouts is needed.
SHAPE_ONLY = names(
    """view reshape flatten unflatten permute transpose swapaxes movedim unsqueeze squeeze chunk split unbind select
    narrow getitem expand expand_as view_as reshape_as tensor_split channel_shuffle pixel_shuffle pixel_unshuffle t
    mT T"""
)

# Those of them that keep every value, so that two results still hold the same values at the same positions.
REARRANGING = names(
    """view reshape flatten unflatten permute transpose swapaxes movedim unsqueeze squeeze view_as reshape_as t mT T"""
)


def concatenate(builder: GraphBuilder, step: Step, *values: Value) -> Value:
    """Tensors beside each other, along the channels or along something else."""
    dim = step.argument(1, "dim")
    assert values[0].tensor is not None
    dim = (0 if dim is None else dim) % values[0].tensor.dim()
    if len(values) != len(step.tensors):
        return Value(reason="cat with tensors that are not features")
    if all(v.dimension == dim for v in values):
        if len({v.node for v in values}) < len(values):
            return Value(reason="cat of the same features twice")  # far from independent
        channels = sum(builder.channels(v) for v in values)
        return builder.write("concatenate", [v.node for v in values], channels, dimension=dim)
    if len({(builder.before_passing(v.node), v.dimension) for v in values}) == 1:
        return builder.passed(values[0])
    return Value(reason="cat along another dimension than the channels")


def moved(builder: GraphBuilder, step: Step, value: Value, *_: Value) -> list[Value]:
    """Replay a function that only moves values on channel numbers and read off where each channel went."""
    numbers = moved_numbers(step, value, number_channels(value, builder.channels(value)))
    if not numbers:
        return [Value(reason=f"{step.name} of something else than features")] * len(step.outputs)
    results = [placed(builder, value, result) for result in numbers]
    if step.name in REARRANGING:
        return results
    # Values that were picked by position are others now, and have a node of their own.
    return [builder.passed(result) if result.node == value.node else result for result in results]


def moved_numbers(step: Step, value: Value, numbers: Tensor) -> list[Tensor]:
    """Replay a function that only moves values on numbers; nothing where it is not the values that it moves."""
    args, kwargs = step.arguments
    tensor = value.tensor
    if not args or tensor is None or args[0] is not tensor:
        return []
    if tensor.is_meta and step.name == "getitem" and tensors((args[1:], kwargs)):
        return []  # an index of which only the shape is known
    results = pytree.tree_leaves(step.function(numbers, *args[1:], **kwargs))
    return [result for result in results if isinstance(result, Tensor)]


def placed(builder: GraphBuilder, value: Value, numbers: Tensor) -> Value:
    """Read off where a function put the channels of a value."""
    found = find_channels(numbers, builder.channels(value))
    if isinstance(found, str):
        return Value(reason=found)
    if found is None:
        return Value(node=value.node, numbers=numbers)
    dimension, index = found
    if index == tuple(range(builder.channels(value))):
        return Value(node=value.node, dimension=dimension)
    return builder.write("gather", [value.node], len(index), dimension=dimension, options=(index,))


def _gather(node: Node, inputs: list[Gaussian], model: nn.Module) -> Gaussian:
    return propagate.gather(inputs[0], torch.tensor(node.options[0], device=inputs[0].mean.device))


def _side_by_side(inputs: list[Gaussian]) -> Gaussian:
    if all(message.variance.dim() == message.mean.dim() for message in inputs):
        return propagate.concatenate(inputs)
    inputs = [_matrix_form(message) for message in inputs]
    groups = max(len(message.mean) for message in inputs)
    blocks = [message.variance.expand(groups, -1, -1).unbind() for message in inputs]
    variance = torch.stack([torch.block_diag(*parts) for parts in zip(*blocks, strict=True)])  # type: ignore[no-untyped-call]
    return Gaussian(torch.cat([message.mean.expand(groups, -1) for message in inputs], -1), variance)


def _matrix_form(message: Gaussian) -> Gaussian:
    """Give a message that holds for all groups, or only variances, a group dimension and a covariance matrix."""
    variance = message.variance
    if variance.dim() == message.mean.dim():
        variance = torch.diag_embed(variance)
    return (
        message._replace(variance=variance) if message.mean.dim() > 1 else Gaussian(message.mean[None], variance[None])
    )


def _lower_gather(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    return builder.write(op.GATHER, builder.slot(node.channels), inputs[0], index=tuple(node.options[0]))


def _lower_concatenate(builder: ProgramBuilder, node: Node, inputs: Sequence[Slot]) -> Slot:
    out = builder.slot(sum(slot.channels for slot in inputs))
    start = 0
    for slot in inputs:
        builder.copy(slot, Slot(out.mean + start, out.variance + start, slot.channels))
        start += slot.channels
    return out


RULES = {
    "gather": Rule(_gather, _lower_gather, unsaid, dict.fromkeys(SHAPE_ONLY, moved)),
    "concatenate": Rule(
        lambda _, inputs, __: propagate.concatenate(inputs),
        _lower_concatenate,
        lambda _, inputs: f"[{', '.join(inputs)}]",
        dict.fromkeys(("cat", "concat", "concatenate"), concatenate),
        lambda _, inputs, __: _side_by_side(inputs),
    ),
}
