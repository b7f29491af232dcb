"""What all of our autograd nodes need."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# `cpu/extension.cpp` says the same.
ONCE = (
    "a Batch Kalman layer cannot be differentiated twice while it normalizes by its batch: "
    "take such gradients in evaluation mode (model.eval()), or of bkn.to_batch_norm(model)"
)
Gradients = tuple[Tensor | None, ...]


def is_eager() -> bool:
    """Whether operations run as they are called: nothing compiles them or transforms them."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def with_signature(node: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Keep the signature of a node's forward, which `apply` otherwise works out anew at every call (60 µs on a CPU)."""
    node.forward.__signature__ = inspect.signature(node.forward)  # type: ignore[attr-defined]
    return node


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Make a node's backward from one that is given what was saved, and refuse a derivative of what it returns.

    PyTorch's decorator of this name refuses it only where the gradients that arrive have one: it takes what depends on
    the saved tensors for constants, and a second derivative is wrong without a word.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *gradients: Tensor | None) -> Gradients:
        saved = ctx.saved_tensors  # only once, as activation checkpointing wants it
        with torch.no_grad():
            results = backward(ctx, saved, *gradients)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return results
        known = [result for result in results if result is not None]
        marked = iter(_Once.apply(len(known), *known, *gradients, *saved))
        return tuple(None if result is None else next(marked) for result in results)

    return once


class _Once(torch.autograd.Function):
    """Some tensors as they are, computed from those that follow them in a way that has no derivative."""

    @staticmethod
    def forward(count: int, *tensors: Tensor | None) -> Gradients:
        """Return the first `count` tensors."""
        return tuple(tensor.clone() for tensor in tensors[:count] if tensor is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Gradients:
        """Refuse."""
        raise RuntimeError(ONCE)
