"""Noticing a value that is not finite in the step where it appears, naming where, and undoing what the step touched."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bkn_core.errors import DivergedError
from bkn_core.layers.batch_kalman import BatchKalmanNorm


class BufferSnapshot:
    """The buffers of a model as they were before a step.

    Args:
        model: whose buffers; those that are finite now are expected to stay so.
    """

    def __init__(self, model: nn.Module) -> None:
        buffers = list(model.buffers())
        numbers = [b for b in buffers if b.is_floating_point()]
        self.finite = [b for b in numbers if b.isfinite().all()]
        counters = [b for b in buffers if not b.is_floating_point()]
        # One copy for each kind: a list of mixed types would be copied one by one on a GPU.
        self.kept = [(kind, [b.clone() for b in kind]) for kind in (numbers, counters) if kind]
        copies = {id(b): copy for kind, clones in self.kept for b, copy in zip(kind, clones, strict=True)}
        layers = [m for m in model.modules() if isinstance(m, BatchKalmanNorm) and m.num_batches_tracked is not None]
        self.counted = [(layer, layer.num_batches_tracked, copies[id(layer.num_batches_tracked)]) for layer in layers]

    def take(self) -> None:
        """Remember the buffers of this moment."""
        for buffers, copies in self.kept:
            torch._foreach_copy_(copies, buffers)

    def forgotten(self) -> list[Tensor]:
        """Return a number for each layer that ran since, infinite where it has not counted its batch: its statistics
        were not finite, and it has not remembered them. Compiled layers do not say that they ran.
        """
        ran = [(now, before) for layer, now, before in self.counted if layer.__dict__.pop("was_tracked", False)]
        if not ran:
            return []
        now, before = (torch.stack(counts) for counts in zip(*ran, strict=True))
        return [torch.where(now == before, math.inf, 0.0)]

    def restore(self) -> None:
        """Put the remembered values back, so that a bad step leaves moving statistics as they were."""
        for buffers, copies in self.kept:
            torch._foreach_copy_(buffers, copies)


def all_finite(loss: Tensor, tensors: list[Tensor]) -> bool:
    """Whether the loss and every tensor are finite; one wait for the device."""
    # The largest magnitude, because a sum of squares overflows long before its values do.
    largest = torch._foreach_norm(tensors, math.inf) if tensors else []
    return bool(torch.stack([loss.detach(), *largest]).isfinite().all().item())


def bad_parameter(model: nn.Module) -> str | None:
    """Name the first parameter that is not finite."""
    return next((name for name, p in model.named_parameters() if not p.isfinite().all()), None)


def check_weights(model: nn.Module, average: nn.Module, step: int) -> None:
    """Refuse weights that an update made infinite: a finite gradient can do it, and no later step would see it in time.

    Raises:
        DivergedError: naming the first such parameter of the model or of the moving average of its weights.
    """
    for kind, net in (("parameter", model), ("averaged parameter", average)):
        if (name := bad_parameter(net)) is not None:
            raise DivergedError(
                f"step {step}: the {kind} {name} is not finite after the update",
                "Lower optim.lr or set train.clip_norm.",
            )


def first_not_finite(model: nn.Module, forward: Callable[[], Tensor]) -> str:
    """Name a parameter, a layer's output in a repeated forward, a gradient or a statistic that is not finite."""
    if (parameter := bad_parameter(model)) is not None:
        return f"parameter {parameter}"
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
    if bad:
        return f"gradient of {bad[-1]}"
    statistics = [name for name, buffer in model.named_buffers() if not buffer.isfinite().all()]
    return f"statistic {statistics[0]}" if statistics else "gradient or statistic of a layer"


def _bad(output: object) -> bool:
    return isinstance(output, Tensor) and not bool(output.isfinite().all())
