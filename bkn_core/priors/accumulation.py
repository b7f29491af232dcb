"""Gradients of one optimizer step from several forwards: the priors are computed once for all of them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from bkn_core.errors import ConversionError
from bkn_core.filter.kalman import Gaussian
from bkn_core.graph.kernel_program import KernelProgram
from bkn_core.graph.lookup import Entries, modules_of
from bkn_core.graph.triton_program import TritonProgram
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.ops import extension, kernels
from bkn_core.ops.track import existing
from bkn_core.priors.hooks import PriorHooks, find_all_hooks
from bkn_core.priors.sources import Predictions, Shared


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
    shared = hooks.shared = _begin(hooks, owner)
    try:
        yield
        shared.finish()
    finally:
        hooks.shared = None
        shared.close()


def _begin(hooks: PriorHooks, owner: nn.Module) -> Shared:
    """Return the constants of a block: by the kernels where they can take the tensors."""
    row = _row(hooks, owner) if torch.is_grad_enabled() else None
    if row is not None:
        return row
    layers = hooks.layers(owner)
    return _by_autograd(hooks.predictions(owner, layers), layers, modules_of(owner))


def _row(hooks: PriorHooks, owner: nn.Module) -> Shared | None:
    """Return constants that the kernels give in one row, that of the last block where they can; None without."""
    row = hooks.row
    if kernels.are_usable() and row is not None and row.begin(owner):
        return row
    programs, operations = hooks.programs(owner), extension.operations()
    entries = programs.last.tensors(owner) if programs is not None and programs.is_whole else None
    if programs is None or entries is None:
        return None
    if isinstance(programs.last, TritonProgram):
        return _by_node(programs.last, owner, entries) if programs.last.tensors.known(owner) is entries else None
    if operations is not None and (row is None or row.entries is not entries):
        row = hooks.row = _by_kernels(programs.last, entries, operations)
        if row.begin(owner):
            return row
    return None


def _by_kernels(program: KernelProgram, entries: Entries, operations: extension.Operations) -> Shared:
    """Return constants that lie in one row (`cpu/shared_row.h`), which every block fills anew.

    Args:
        program: gives them.
        entries: of the tensors that it reads.
        operations: of C++.
    """
    row = operations.row(program.in_cpp(operations), entries.values)
    leaf, parts = row.parts()

    def fill(model: nn.Module) -> bool:
        return program.tensors.known(model) is entries and row.begin()

    return Shared(program.named(parts), [leaf], entries, row.finish, fill)


def _by_node(program: TritonProgram, model: nn.Module, entries: Entries) -> Shared:
    """Return constants that are the results of one autograd node, for one block.

    Their gradients are added to `.grad` all at once, but where a hook watches a parameter.

    Args:
        program: gives them.
        model: of the block.
        entries: of the tensors that it reads.
    """
    row = program.row(model, entries.values)
    leaf = row.detach().requires_grad_(row.requires_grad)
    versions = [tensor._version for tensor in entries.values]

    def pass_on() -> bool:
        if versions != [tensor._version for tensor in entries.values]:
            return False
        if leaf.grad is not None:
            _add_gradients(row, leaf.grad, list(dict.fromkeys(t for t in entries.values if t.requires_grad)))
        return True

    return Shared(program.named(program.parts(leaf)), [leaf], entries, pass_on)


def _add_gradients(row: Tensor, gradient: Tensor, parameters: Sequence[Tensor]) -> None:
    if any(t._backward_hooks or t._post_accumulate_grad_hooks or not t.is_leaf for t in parameters):
        row.backward(gradient)  # type: ignore[no-untyped-call]
        return
    found = torch.autograd.grad(row, parameters, gradient, allow_unused=True)
    pairs = [(t, part) for t, part in zip(parameters, found, strict=True) if part is not None]
    added = [(t.grad, part) for t, part in pairs if t.grad is not None]
    if added:
        torch._foreach_add_([total for total, _ in added], [part for _, part in added])
    for tensor, part in pairs:
        if tensor.grad is None:
            tensor.grad = part


def _by_autograd(found: Predictions, layers: Mapping[str, BatchKalmanNorm], modules: Sequence[nn.Module]) -> Shared:
    """Return constants that stand for priors and gains with a graph, for one block.

    Args:
        found: priors and gains with their graph.
        layers: by name.
        modules: of the converted model.
    """
    priors, gains = found
    outputs = [*itertools.chain.from_iterable(priors.values()), *gains.values()]
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in outputs]
    parts = iter(leaves)
    constants = {name: Gaussian(next(parts), next(parts)) for name in priors}, dict(zip(gains, parts, strict=True))
    buffers = [layer._buffers for layer in layers.values()]  # which attributes find after parameters
    schedules = existing([own[name] for own in buffers for name in ("gain_factor", "fixed_gain")])
    entries = Entries((m._parameters, name, p) for m in modules for name, p in m._parameters.items())
    watched = [*existing(entries.values), *schedules]
    versions = [tensor._version for tensor in watched]

    def pass_on() -> bool:
        if versions != [tensor._version for tensor in watched]:
            return False
        reached = [(output, leaf.grad) for output, leaf in zip(outputs, leaves, strict=True)]
        reached = [(output, gradient) for output, gradient in reached if gradient is not None]
        if reached:
            torch.autograd.backward([output for output, _ in reached], [gradient for _, gradient in reached])
        return True

    return Shared(constants, leaves, entries, pass_on)
