"""The gradient of the innovations, so that training differentiates the function that it evaluates.

A prior is moved and scaled by running numbers: its mean by δ standard deviations, its variance by exp(ι). A running
number is a constant to the gradient: the network could shift its mean and grow its variance in directions that the
closed form of the prior does not know, which δ and ι take back some steps later, and the update was wasted. The numbers
that they run after have a gradient:

    δ → mean_G(x̄ - µ') / sqrt(N + ε) ,   ι → log( (N + ε) / (v' + ε) ) ,   N = mean_G( S + (x̄ - µ')² )

so the loss gets h ∇ι with h = ∂L/∂ι, what a larger prior does to the loss, which the backward pass knows anyway, and
likewise for δ. With few images h is noise that belongs to the very groups that ∇ι is computed from. So a layer
remembers a running mean h̄ of both, its *sensitivity*, and n images use

    (1-α) h̄ + α h,   α = min(1, max(n / 128, 1/10))

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

from bkn_core.norm.kalman import Gaussian, average_over_groups, log_innovation

IMAGES, PASSES = 128, 10  # that the running sensitivity looks back on, whichever is less


class Sensitivity(NamedTuple):
    """The sensitivity h̄ of a layer: the one in use since the last forward, and the one that backward passes move.

    Shape:
        (2, C) each: to the innovation of the variance and to that of the mean.
    """

    used: Tensor
    newest: Tensor


class Processes(NamedTuple):
    """Where a forward spans processes: their number, the images of all of them, and how to add a tensor over them."""

    number: int
    images: Tensor
    total: Callable[[Tensor], Tensor]


def weight_of(images: int) -> float:
    """Return by how much so many images move the newest sensitivity: α."""
    return min(1.0, max(images / IMAGES, 1 / PASSES))


def remember(sensitivity: Sensitivity, seen: Tensor, images: int | Tensor) -> Tensor:
    """Move the newest sensitivity, in place, towards what one backward pass saw, and return what that pass uses.

        h̄ ← (1-α) h̄ + α h

    Args:
        sensitivity: of the layer.
        seen: h; a number that is not finite, as mixed precision meets them, is not remembered.
        images: how many h sums over.

    Shape:
        (2, C) each.
    """
    used, newest = sensitivity
    seen = seen.to(newest.dtype)
    weight = (images / IMAGES).clamp(1 / PASSES, 1) if isinstance(images, Tensor) else weight_of(images)
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
    """Return the same diagonal prior, with the gradient of its innovations beside its own.

    Args:
        prior: µ', v', for all groups or for each.
        observed: x̄, S.
        share: the part of the images that each group holds; None where all are equal.
        eps: ε.
        sensitivity: of the layer.
        images: in this forward.
        processes: where S is that of several processes.

    Shape:
        prior (C,) or (G, C), observed (G, C), share (G, 1), sensitivity (2, C).
    """
    innovation = log_innovation(prior, observed, share, eps)
    difference = observed.mean - prior.mean
    spread = average_over_groups(torch.addcmul(observed.variance, difference, difference), share)
    deviation = (spread.detach() + eps).sqrt()
    innovations = torch.stack((innovation, average_over_groups(difference, share) / deviation))
    return Gaussian(*_Follow.apply(*prior, innovations, deviation, *sensitivity, images, processes))


class _Follow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        variance: Tensor,
        innovations: Tensor,
        deviation: Tensor,
        sensitivity: Tensor,
        newest: Tensor,
        images: int,
        processes: Processes | None,
    ) -> tuple[Tensor, Tensor]:
        """Return µ' and v'."""
        ctx.save_for_backward(variance, deviation)
        ctx.sensitivity, ctx.images, ctx.processes = Sensitivity(sensitivity, newest), images, processes
        return mean.clone(), variance.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_mean: Tensor, to_variance: Tensor) -> tuple[Tensor | None, ...]:
        """Send the sensitivity to the innovations."""
        variance, deviation = ctx.saved_tensors
        parts = to_variance * variance, to_mean * deviation
        seen = torch.stack([part.reshape(-1, part.shape[-1]).sum(0) for part in parts])
        images, number = ctx.images, 1
        if ctx.processes is not None:  # the gradients of S of all processes are added up
            seen, images, number = ctx.processes.total(seen), ctx.processes.images, ctx.processes.number
        running = remember(ctx.sensitivity, seen, images) / number
        return to_mean, to_variance, running.to(to_variance.dtype), None, None, None, None, None
