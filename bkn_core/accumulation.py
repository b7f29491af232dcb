"""Gradients of one optimizer step from several forwards: the priors are computed once for all of them."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bkn_core.convert import find_messenger
from bkn_core.errors import ConversionError
from bkn_core.norm.kalman import Gaussian
from bkn_core.wiring.messenger import Held, Messenger
from bkn_core.wiring.native_node import add_gradients_, evaluate, results_of


@contextlib.contextmanager
def accumulation(model: nn.Module) -> Iterator[None]:
    """Compute the priors of a converted model once for all forwards of an optimizer step.

        with bkn.accumulation(model):
            for images, labels in parts:
                (loss(model(images), labels) / len(parts)).backward()
        optimizer.step()

    The parameters do not change between these forwards, so neither do the priors: the forwards use them as constants,
    whose gradients are added up and sent through the priors' own computation when the block ends. The gradients are the
    same, and the priors cost what they cost in one forward. Innovations move inside the block and act after it.
    Where priors depend on the activations (raw messages, learned transitions) and in compiled models nothing is saved.

    Args:
        model: a converted model, not wrapped by `DistributedDataParallel`, which counts the gradients of each backward.

    Raises:
        ConversionError: the model was not converted, is wrapped, or its parameters changed inside the block.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ConversionError(
            "DistributedDataParallel needs the gradients of every parameter from every backward pass",
            "Leave bkn.accumulation out there: no_sync() alone is correct.",
        )
    owner, messenger = find_messenger(model)
    if not messenger.is_static or messenger.held is not None:
        yield
        return
    messenger.held, leaves, finish = _hold(messenger, owner)
    versions = [parameter._version for parameter in owner.parameters()]
    try:
        yield
    finally:
        messenger.held = None
    if versions != [parameter._version for parameter in owner.parameters()]:
        raise ConversionError("parameters changed inside bkn.accumulation", "Step the optimizer after the block.")
    if any(leaf.grad is not None for leaf in leaves):
        finish([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves])


_Finish = Callable[[list[Tensor]], None]


def _hold(messenger: Messenger, owner: nn.Module) -> tuple[Held, list[Tensor], _Finish]:
    """Return constants that stand for priors and gains, all of them in a row, and what to do with their gradients."""
    layers = messenger.layers(owner)
    innovations = [None if layer.innovation is None else layer.innovation.clone() for layer in layers]
    tensors, program = messenger.native_tensors(owner), messenger.native
    if tensors is not None and program is not None and torch.is_grad_enabled() and _may_be_added_to(tensors):
        values = evaluate(program, tensors)
        leaves = [part.detach().requires_grad_() for part in results_of(program, values)]
        finish: _Finish = functools.partial(add_gradients_, program, tensors, values)
        return Held(*program.named(leaves), innovations), leaves, finish
    priors, gains = messenger.predictions(owner, layers)
    outputs = [*itertools.chain.from_iterable(priors.values()), *gains]
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in outputs]
    pairs = iter(leaves)
    held = {name: Gaussian(next(pairs), next(pairs)) for name in priors}
    return Held(held, list(pairs), innovations), leaves, functools.partial(_backward, outputs)


def _backward(outputs: list[Tensor], gradients: list[Tensor]) -> None:
    reached = [(output, part) for output, part in zip(outputs, gradients, strict=True) if output.requires_grad]
    torch.autograd.backward([output for output, _ in reached], [part for _, part in reached])


def _may_be_added_to(tensors: list[Tensor]) -> bool:
    """Whether gradients can be added in place: of leaves, each there once, that nothing watches."""
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    is_alone = len({id(tensor) for tensor in wanted}) == len(wanted)
    return is_alone and all(
        tensor.is_leaf and not tensor._backward_hooks and not tensor._post_accumulate_grad_hooks for tensor in wanted
    )
