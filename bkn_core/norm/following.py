"""The gradient of the innovation, so that training differentiates the function that it evaluates.

A prior is scaled to a running ratio of observed to predicted variance, exp(ι). A running number is a constant to the
gradient: the network could grow its variance in directions that the closed form of the prior does not know, which ι
takes back some steps later, and the update was wasted. The number that ι runs after has a gradient:

    ι → log( (N + ε) / (v' + ε) ),   N = mean_G( S + (x̄ - µ')² )

so the loss gets h ∇ι with h = ∂L/∂ι, what a larger prior does to the loss, which the backward pass knows anyway. With
few images h is noise that belongs to the very groups that ∇ι is computed from. So a layer remembers a running mean h̄ of
it over as many images as batch normalization wants, its *sensitivity*, and n images use

    (1-α) h̄ + α h,   α = min(1, n / 128)

Backward passes move h̄, and the next forward takes it into use: passes without a forward between them use the same h̄,
whatever their order.
The scale of the weights cancels in ι, so an old h̄ moves no norm of a weight. h̄ has the scale of the loss that it was
measured with; another one, as mixed precision sets it now and then, is known after 128 images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bkn_core.norm.kalman import Gaussian, log_innovation

IMAGES = 128  # that the running sensitivity looks back on


class Sensitivity(NamedTuple):
    """The sensitivity h̄ of a layer: the one in use since the last forward, and the one that backward passes move."""

    used: Tensor
    newest: Tensor


class Processes(NamedTuple):
    """Where a forward spans processes: their number, the images of all of them, and how to add a tensor over them."""

    number: int
    images: Tensor
    total: Callable[[Tensor], Tensor]


def weight_of(images: int) -> float:
    """Return by how much so many images move the newest sensitivity: min(1, images / 128)."""
    return min(1.0, images / IMAGES)


def remember(sensitivity: Sensitivity, seen: Tensor, images: int | Tensor) -> Tensor:
    """Move the newest sensitivity, in place, towards what one backward pass saw, and return what that pass uses.

        h̄ ← (1-α) h̄ + α h,   α = min(1, images / 128)

    Args:
        sensitivity: of the layer.
        seen: h; a number that is not finite, as mixed precision meets them, is not remembered.
        images: how many h sums over.

    Shape:
        (C,) each.
    """
    used, newest = sensitivity
    seen = seen.to(newest.dtype)
    weight = (images / IMAGES).clamp_max(1) if isinstance(images, Tensor) else weight_of(images)
    newest.lerp_(torch.where(seen.isfinite(), seen, newest), weight)
    return torch.lerp(used, torch.where(seen.isfinite(), seen, used), weight)


def follow(
    prior: Gaussian,
    observed: Gaussian,
    share: Tensor | None,
    eps: float,
    sensitivity: Sensitivity,
    images: int,
    processes: Processes | None = None,
) -> Gaussian:
    """Return the same diagonal prior, whose variance has the gradient of its innovation beside its own.

    Args:
        prior: µ', v', for all groups or for each.
        observed: x̄, S.
        share: the part of the images that each group holds; None where all are equal.
        eps: ε.
        sensitivity: of the layer.
        images: in this forward.
        processes: where S is that of several processes.

    Shape:
        prior (C,) or (G, C), observed (G, C), share (G, 1), sensitivity (C,).
    """
    innovation = log_innovation(prior, observed, share, eps)
    return Gaussian(prior.mean, _Follow.apply(prior.variance, innovation, *sensitivity, images, processes))


class _Follow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        variance: Tensor,
        innovation: Tensor,
        sensitivity: Tensor,
        newest: Tensor,
        images: int,
        processes: Processes | None,
    ) -> Tensor:
        """Return v'."""
        ctx.save_for_backward(variance)
        ctx.sensitivity, ctx.images, ctx.processes = Sensitivity(sensitivity, newest), images, processes
        return variance.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Send the sensitivity to the innovation."""
        (variance,) = ctx.saved_tensors
        seen = (gradient * variance).reshape(-1, variance.shape[-1]).sum(0)
        images, number = ctx.images, 1
        if ctx.processes is not None:  # the gradients of S of all processes are added up
            seen, images, number = ctx.processes.total(seen), ctx.processes.images, ctx.processes.number
        running = remember(ctx.sensitivity, seen, images) / number
        return gradient, running.to(gradient.dtype), None, None, None, None
