"""Gradients of one optimizer step from several forwards: the priors are computed once for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from bkn_core.errors import ConversionError
from bkn_core.graph.kernel_program import KernelProgram
from bkn_core.graph.lookup import modules_of
from bkn_core.ops import extension, kernels
from bkn_core.priors.hooks import PriorHooks, find_all_hooks
from bkn_core.priors.shared import Shared, SharedOutputs, SharedResults, SharedRow


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
    the priors cost what they cost in one forward, or less: the kernels add to `.grad` in place. What layers remember
    moves when the block ends, by all its forwards as if they had been one. An error inside leaves gradients without the
    part of the priors.

    A forward whose priors are not those of the block computes its own: with raw messages, learned transitions, other
    parameters (`torch.func.functional_call`), gradients where the block began without, or compiled.

    Args:
        model: a model with converted parts, not in `DistributedDataParallel`, which counts gradients at each backward.

    Raises:
        ConversionError: the model was not converted or is distributed; its parameters changed inside the block; a
            backward pass through one of its forwards came after it.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _refuse_distributed(model)
    own = [(model, hook) for hook in model._forward_pre_hooks.values() if isinstance(hook, PriorHooks)]
    with contextlib.ExitStack() as blocks:
        for owner, hooks in own or find_all_hooks(modules_of(model)):
            if hooks.is_static and hooks.shared is None:
                blocks.enter_context(_block(owner, hooks))
        yield


def _refuse_distributed(model: nn.Module) -> None:
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in modules_of(model)):
        raise ConversionError(
            "DistributedDataParallel needs the gradients of every parameter from every backward pass",
            "Leave bkn.accumulation out there: no_sync() alone is correct.",
        )


@contextlib.contextmanager
def _block(owner: nn.Module, hooks: PriorHooks) -> Iterator[None]:
    shared = hooks.shared = _share(hooks, owner)
    try:
        yield
        shared.end.is_past = True
        shared.finish()
    finally:
        shared.end.is_past, hooks.shared = True, None
        shared.track()


def _share(hooks: PriorHooks, owner: nn.Module) -> Shared:
    """Return constants that stand for priors and gains."""
    if torch.is_grad_enabled():
        row = _row(hooks, owner)
        if row is not None:
            return row
    layers = hooks.layers(owner)
    named = dict(zip(hooks.names, layers, strict=True))
    return SharedOutputs(hooks.predictions(owner, layers), named, modules_of(owner))


def _row(hooks: PriorHooks, owner: nn.Module) -> Shared | None:
    """Return constants that the kernels give in one row, None where they do not."""
    row = hooks.row
    if kernels.are_usable() and row is not None and row.begins(owner):
        return row
    programs = hooks.programs(owner)
    entries = programs.last.tensors(owner) if programs is not None and programs.is_whole else None
    if programs is None or entries is None:
        return None
    if programs.kind is not KernelProgram:
        is_kept = programs.last.tensors.known(owner) is entries
        return SharedResults(programs.last, programs.last.run(owner, entries.values), entries) if is_kept else None
    operations = extension.operations()
    if operations is not None and (row is None or row.entries is not entries):
        row = hooks.row = SharedRow(programs.last, entries, operations)
        if row.begins(owner):
            return row
    return None
