"""Noticing a value that is not finite in the step where it appears, naming where, and undoing what the step touched."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class BufferSnapshot:
    """The floating-point buffers of a model as they were before a step."""

    def __init__(self, model: nn.Module) -> None:
        self.buffers = [b for b in model.buffers() if b.is_floating_point()]
        self.copies = [b.clone() for b in self.buffers]

    def take(self) -> None:
        """Remember the buffers of this moment."""
        if self.buffers:
            torch._foreach_copy_(self.copies, self.buffers)

    def restore(self) -> None:
        """Put the remembered values back, so that a bad step leaves moving statistics as they were."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.copies)


def all_finite(loss: Tensor, parameters: list[nn.Parameter]) -> bool:
    """Whether the loss and every gradient are finite; one wait for the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).sum() if gradients else loss.new_zeros(())
    return bool(torch.isfinite(loss.detach() + norm).item())


def first_not_finite(model: nn.Module, forward: Callable[[], Tensor]) -> str:
    """Name the first thing that is not finite: a parameter, a layer's output in a repeated forward, or a gradient."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"parameter {name}"
    found: list[str] = []
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: found.append(name) if _bad(output) else None)
        for name, module in model.named_modules()
        if name and not list(module.children())
    ]
    try:
        with torch.no_grad():
            loss = forward()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"output of layer {found[0]}"
    if not loss.isfinite().all():
        return "loss"
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return f"gradient of {bad[-1]}" if bad else "gradient"


def _bad(output: object) -> bool:
    return isinstance(output, Tensor) and not bool(output.isfinite().all())
