"""The gradient of the inflations, so that training differentiates the function that it evaluates.

A prior is moved and scaled by running numbers: its mean by δ standard deviations, its variance by exp(ι). A running
number is a constant to the gradient: the network could shift its mean and grow its variance in directions that the
closed form of the prior does not know, which δ and ι take back some steps later, and the update was wasted. The numbers
that they run after have a gradient:

    δ → m / d ,   ι → N / v' ,   m = mean_G(x̄ - µ'),   N = mean_G( S + (x̄ - µ')² ),   d² = v' + ε

so the loss gets h ∇ι with h = ∂L/∂ι, what a larger prior does to the loss, which the backward pass knows anyway, and
likewise for δ. With few images h is noise that belongs to the very images that ∇ι is computed from. So a layer
remembers a running mean h̄ of both over 10 forwards, its *sensitivity*, and uses that of the forwards before. With it
the gradient is a sum over groups: it does not depend on how the images of a step are split over forwards or processes.

One image that is far from all others shows a spread N_g = S_g + (x̄_g - µ')² of many times v', and would decide alone
where the weights go. So beyond r = 3 times v' what a group shows counts by its logarithm:

    N / v' = mean_G b( N_g / v' ) ,   b(x) = x up to r ,  r (1 + log(x / r)) beyond ,   d² = max( v', mean_G(N_g) / r )

There is one exception to h̄. Where many images are in a forward and its h suddenly is many times larger, as when some
are misread with confidence, the step would go where ι takes it back, by many times its usual length (`docs/method.md`
tells of a training that three such steps spoiled). So a forward of n images uses

    h̄ + α ( u - clip(u, ±30 rms_C(h̄)) ),   u = h - h̄,   α = clip( (n - 32) / (128 - 32), 0, 1)

With few images an h of that size is common, and noise of the very images.
Backward passes gather h, and the next forward takes it into h̄.
The scale of the weights cancels in ι, so an old h̄ moves no norm of a weight. h̄ has the scale of the loss that it was
measured with; another one, as mixed precision sets it now and then, is known after some steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bkn_core.filter.autograd import once_differentiable
from bkn_core.filter.kalman import Gaussian, average_over_groups, limited

WEIGHT = 0.1  # of the newest forward in the running sensitivity
USUAL = 30.0  # times the root mean square of h̄, by which the h of a forward may differ from it
FEW, MANY = 32, 128  # images of a forward from which what is beyond is followed, and followed wholly
LARGEST_RATIO = 3.0  # r: of what one group shows to v', beyond which it counts by its logarithm


class Sensitivity(NamedTuple):
    """The sensitivity h̄ of a layer, and what backward passes have gathered since its last forward.

    Shape:
        used (2, C): to the inflation of the variance and to that of the mean; gathered (3, C): sums of both h over
        passes, and the number of passes.
    """

    used: Tensor
    gathered: Tensor


class Processes(NamedTuple):
    """Where a forward spans processes: their number, the images of all of them, and how to add a tensor over them."""

    number: int
    images: Tensor
    total: Callable[[Tensor], Tensor]


def gather(gathered: Tensor, seen: Tensor) -> None:
    """Add what one backward pass saw, in place.

    Args:
        gathered: of `Sensitivity`.
        seen: h; a channel in which it is not finite, as mixed precision meets them, is left out.

    Shape:
        gathered (3, C), seen (2, C).
    """
    number = torch.ones_like(seen[:1])
    terms = torch.cat((seen, number)).to(gathered.dtype)
    gathered.add_(torch.where(terms.isfinite().all(0), terms, torch.zeros_like(terms)))


def remembered(used: Tensor, gathered: Tensor) -> Tensor:
    """Return the running sensitivity h̄ ← h̄ + w (h - h̄) after the passes that were gathered, of which h is the mean.

    Shape:
        used (2, C), gathered (3, C) -> (2, C).
    """
    number = gathered[2]
    newest = gathered[:2] / torch.where(number > 0, number, torch.ones_like(number))
    return torch.where(number > 0, torch.lerp(used, newest, WEIGHT), used)


def own_part(images: int | Tensor) -> float | Tensor:
    """Return the part α of what is beyond the usual that a forward of so many images follows."""
    part = (images - FEW) / (MANY - FEW)
    return part.clamp(0, 1) if isinstance(part, Tensor) else min(1.0, max(0.0, part))


def used(running: Tensor, seen: Tensor, images: int | Tensor) -> Tensor:
    """Return the sensitivity that a backward pass uses: h̄, and of its own h what is beyond the usual.

    Args:
        running: h̄; 0 in all channels before the first is known, and then used as it is.
        seen: h, ignored where it is not finite.
        images: n, how many h sums over.

    Shape:
        running (2, C), seen (2, C) -> (2, C).
    """
    part = own_part(images)
    if not isinstance(part, Tensor) and part == 0:
        return running
    usual = USUAL * running.square().mean(-1, keepdim=True).sqrt()
    surplus = seen.to(running.dtype) - running
    beyond = surplus - torch.minimum(torch.maximum(surplus, -usual), usual)
    followed = (running + part * beyond).to(running.dtype)
    return torch.where(surplus.isfinite() & (usual > 0), followed, running)


def weights(spread: Tensor, predicted: Tensor, eps: float) -> Tensor:
    """Return how much of its spread each group pulls with, w_g = min( 1, r (v' + ε) / N_g ).

    Shape:
        spread (G, C), predicted (C,) -> (G, C).
    """
    return (LARGEST_RATIO * (predicted + eps) / spread).clamp(max=1)


def deviation(spread: Tensor, predicted: Tensor, eps: float) -> Tensor:
    """Return d, in which the error of the mean is measured: d² = max( v' + ε, (N + ε) / r ).

    Shape:
        spread (C,) of all groups, predicted (C,) -> (C,).
    """
    return torch.maximum(predicted + eps, (spread + eps) / LARGEST_RATIO).sqrt()


def follow(
    prior: Gaussian,
    observed: Gaussian,
    share: Tensor | None,
    eps: float,
    sensitivity: Sensitivity,
    images: int | Tensor,
    processes: Processes | None = None,
) -> Gaussian:
    """Return the same diagonal prior, with the gradient of its inflations beside its own.

    Args:
        prior: µ', v', for all groups or for each.
        observed: x̄, S.
        share: the part of the images that each group holds; None where all are equal.
        eps: ε.
        sensitivity: of the layer.
        images: of the forward.
        processes: where S is that of several processes.

    Shape:
        prior (C,) or (G, C), observed (G, C), share (G, 1), sensitivity (2, C).
    """
    difference = observed.mean - prior.mean
    spread = limited(torch.addcmul(observed.variance, difference, difference))
    predicted = prior.variance if prior.variance.dim() == 1 else average_over_groups(prior.variance, share)
    scale = (predicted + eps).detach()
    width = deviation(average_over_groups(spread, share), predicted, eps).detach()
    pull = average_over_groups(spread * weights(spread, predicted, eps).detach(), share)
    growth = (pull - predicted * (pull + eps).detach() / scale) / scale
    inflations = torch.stack((growth, average_over_groups(difference, share) / width))
    return Gaussian(*_Follow.apply(*prior, inflations, width, *sensitivity, images, processes))


class _Follow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        variance: Tensor,
        inflations: Tensor,
        deviation: Tensor,
        used: Tensor,
        gathered: Tensor,
        images: int | Tensor,
        processes: Processes | None,
    ) -> tuple[Tensor, Tensor]:
        """Return µ' and v'."""
        ctx.save_for_backward(variance, deviation)
        ctx.sensitivity, ctx.images, ctx.processes = Sensitivity(used, gathered), images, processes
        return mean.clone(), variance.clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], to_mean: Tensor, to_variance: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Send the sensitivity to the inflations."""
        variance, deviation = saved
        parts = to_variance * variance, to_mean * deviation
        seen = torch.stack([part.reshape(-1, part.shape[-1]).sum(0) for part in parts])
        number = 1
        if ctx.processes is not None:  # the gradients of S of all processes are added up
            seen, number = ctx.processes.total(seen), ctx.processes.number
        gather(ctx.sensitivity.gathered, seen)
        to_inflations = used(ctx.sensitivity.used, seen, ctx.images) / number
        return to_mean, to_variance, to_inflations.to(to_variance.dtype), *[None] * 5
