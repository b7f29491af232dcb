"""Gradients of one optimizer step from several forwards: the priors are computed once for all of them."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bkn_core.convert import find_messengers
from bkn_core.errors import ConversionError
from bkn_core.norm import compiled_node
from bkn_core.norm.kalman import Gaussian
from bkn_core.norm.together import those
from bkn_core.wiring.held import Held
from bkn_core.wiring.lookup import modules_of
from bkn_core.wiring.messenger import Messenger
from bkn_core.wiring.native_node import add_gradients_, evaluate


@contextlib.contextmanager
def accumulation(model: nn.Module) -> Iterator[None]:
    """Compute the priors of a converted model once for all forwards of an optimizer step.

        with bkn.accumulation(model):
            for images, labels in parts:
                (loss(model(images), labels) / len(parts)).backward()
        optimizer.step()

    The parameters do not change between these forwards, so neither do the priors: the forwards use them as constants,
    whose gradients are added up and sent through the priors' own computation when the block ends, into `.grad` like
    those of `backward()`; what `torch.autograd.grad` returns inside the block lacks them. The sums are the same, and
    the priors cost what they cost in one forward, or less: the kernels add to `.grad` in place. Innovations move inside
    the block and act after it. An error inside leaves gradients without the part of the priors.

    A forward whose priors are not those of the block computes its own: with raw messages, learned transitions, other
    parameters (`torch.func.functional_call`), gradients where the block began without, or compiled.

    Args:
        model: a model with converted parts, not in `DistributedDataParallel`, which counts gradients at each backward.

    Raises:
        ConversionError: the model was not converted or is distributed; its parameters changed inside the block; a
            backward pass through one of its forwards came after it.
    """
    modules = modules_of(model)
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in modules):
        raise ConversionError(
            "DistributedDataParallel needs the gradients of every parameter from every backward pass",
            "Leave bkn.accumulation out there: no_sync() alone is correct.",
        )
    with contextlib.ExitStack() as blocks:
        for owner, messenger in find_messengers(modules):
            if messenger.is_static and messenger.held is None:
                blocks.enter_context(_block(owner, messenger, modules if owner is model else modules_of(owner)))
        yield


@contextlib.contextmanager
def _block(owner: nn.Module, messenger: Messenger, modules: list[nn.Module]) -> Iterator[None]:
    held, leaves, finish = _hold(messenger, owner, modules)
    messenger.held = held
    try:
        yield
    finally:
        held.end.is_past, messenger.held = True, None
    if not held.is_current():
        raise ConversionError(
            "parameters or gains changed inside bkn.accumulation", "Step optimizer and schedule outside the block."
        )
    if any(leaf.grad is not None for leaf in leaves):
        finish([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves])


_Finish = Callable[[list[Tensor]], None]


def _hold(messenger: Messenger, owner: nn.Module, modules: list[nn.Module]) -> tuple[Held, list[Tensor], _Finish]:
    """Return constants that stand for priors and gains, all of them in a row, and what to do with their gradients."""
    layers = messenger.layers(owner)
    buffers = [layer._buffers for layer in layers]  # which attributes find after parameters
    innovations = [None if own["innovation"] is None else own["innovation"].clone() for own in buffers]
    schedules = those([own[name] for own in buffers for name in ("gain_factor", "fixed_gain")])
    tensors, program = messenger.native_tensors(owner), messenger.native
    if tensors is not None and program is not None and torch.is_grad_enabled() and _may_be_added_to(tensors):
        values = evaluate(program, tensors)
        row = values[: program.results].requires_grad_()

        def finish(gradients: list[Tensor]) -> None:
            add_gradients_(program, tensors, values, *gradients)

        return Held(*program.named(row), [row], innovations, modules, schedules), [row], finish
    priors, gains = messenger.predictions(owner, layers)
    outputs = [*itertools.chain.from_iterable(priors.values()), *gains]
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in outputs]
    pairs = iter(leaves)
    held = {name: Gaussian(next(pairs), next(pairs)) for name in priors}
    constants = Held(held, list(pairs), leaves, innovations, modules, schedules)
    return constants, leaves, functools.partial(_backward, outputs)


def _backward(outputs: list[Tensor], gradients: list[Tensor]) -> None:
    reached = [(output, part) for output, part in zip(outputs, gradients, strict=True) if output.requires_grad]
    torch.autograd.backward([output for output, _ in reached], [part for _, part in reached])


def _may_be_added_to(tensors: list[Tensor]) -> bool:
    """Whether gradients can be added in place: of leaves, each there once, that nothing watches."""
    operations = compiled_node.node()
    if operations is not None:
        return operations.may_be_added_to(tensors)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    is_alone = len({id(tensor) for tensor in wanted}) == len(wanted)
    return is_alone and all(
        tensor.is_leaf and not tensor._backward_hooks and not tensor._post_accumulate_grad_hooks for tensor in wanted
    )
