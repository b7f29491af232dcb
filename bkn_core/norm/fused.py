"""Normalization by the posterior as one autograd node in closed form: the path that training uses.

The plain functions in `kalman.py` say the same in a dozen nodes; tests hold the two together.
Per channel and group, with r = (v̂ + ε)^-½, d = x̄ - µ', n values and q the gain:

    forward    µ̂ = µ' + q d ;  v̂ = v' + q (S - v') + q (1-q) d² ;  y = γ r (x - µ̂) + β
    sums       G₁ = Σ dy ;  G₂ = Σ dy (x - µ̂) ;  dβ = G₁ ;  dγ = r G₂
               g_m = g_µ̂ - γ r G₁ ;  g_v = g_v̂ - ½ γ r³ G₂
    backward   gx̄ = q g_m + 2q(1-q) d g_v ;  gS = q g_v
               gµ' = (1-q) g_m - 2q(1-q) d g_v ;  gv' = (1-q) g_v ;  gq = Σ g_m d + g_v (S - v' + (1-2q) d²)
               dx = γ r dy + (2 gS / n) x + (gx̄ - 2 gS x̄) / n

Three passes over the activation forward and three backward, as many as batch normalization has.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bkn_core.norm import passes
from bkn_core.norm.kalman import Gaussian, Moments, guard, update

_LARGEST = 1e30


class FilterSettings(NamedTuple):
    """What the filter needs to know beside tensors: ε, images per statistics group, limit of the guard."""

    eps: float
    statistics_batch_size: int | None = None
    guard_limit: float = math.inf


def kalman_normalize(
    x: Tensor,
    prior: Gaussian | None,
    gain: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    settings: FilterSettings,
) -> tuple[Tensor, Gaussian, Moments]:
    """Normalize every group by its posterior; without a prior by what is observed in it.

    Args:
        x: activations.
        prior: µ', v' of this layer, for all groups or for each; None is batch normalization.
        gain: q in [0, 1], a scalar tensor.
        weight: γ or None.
        bias: β or None.
        settings: see `FilterSettings`.

    Shape:
        x (N, C, *spatial), prior (C,) or (G, C) -> y like x, posterior (G, C), observed (G, C).

    Returns:
        y, the posterior (differentiable: later layers may predict from it), the observed moments (constants).
    """
    size = min(settings.statistics_batch_size or len(x), len(x))
    body = len(x) // size * size
    if body == len(x):
        return _equal_groups(x, prior, gain, weight, bias, settings, len(x) // size)
    # A smaller last group is normalized on its own: rare, so its copy does not matter.
    whole, rest = (_part(prior, slice(None, -1)), _part(prior, slice(-1, None)))
    parts = [
        _equal_groups(x[:body], whole, gain, weight, bias, settings, body // size),
        _equal_groups(x[body:], rest, gain, weight, bias, settings, 1),
    ]
    y = torch.cat([part[0] for part in parts])
    posterior = Gaussian(*(torch.cat(pair) for pair in zip(*(part[1] for part in parts), strict=True)))
    return y, posterior, Moments(*(torch.cat(pair) for pair in zip(*(part[2] for part in parts), strict=True)))


def _equal_groups(
    x: Tensor,
    prior: Gaussian | None,
    gain: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    settings: FilterSettings,
    groups: int,
) -> tuple[Tensor, Gaussian, Moments]:
    prior_mean, prior_variance = prior if prior is not None else (None, None)
    y, mean, variance, observed_mean, observed_variance = _KalmanNormalize.apply(
        x, prior_mean, prior_variance, gain, weight, bias, settings, groups
    )
    count = observed_mean.new_full((groups,), x[0].numel() // x.shape[1] * (len(x) // groups))
    return y, Gaussian(mean, variance), Moments(observed_mean, observed_variance, count)


def _part(prior: Gaussian | None, groups: slice) -> Gaussian | None:
    """Return the prior of some groups; one without a group dimension serves all."""
    if prior is None or prior.mean.dim() == 1:
        return prior
    return Gaussian(prior.mean[groups], prior.variance[groups])


def images_per_group(images: int, statistics_batch_size: int | None, like: Tensor) -> Tensor:
    """Return the number of images of each group as a column (G, 1) of the type and on the device of `like`."""
    size = min(statistics_batch_size or images, images)
    column = like.new_full((-(-images // size), 1), size)
    if images % size:
        column[-1:].fill_(images % size)  # filled on the device: a copy from the host would wait for it
    return column


class _KalmanNormalize(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        prior_mean: Tensor | None,
        prior_variance: Tensor | None,
        gain: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        settings: FilterSettings,
        groups: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Observe, update, apply."""
        view = passes.rows(x, groups)
        observed_mean, observed_variance = passes.observe(view)
        mean, variance = observed_mean, observed_variance
        if prior_mean is not None and prior_variance is not None:
            gain = _effective_gain(prior_variance, observed_variance, gain, settings)
            prior, observed = Gaussian(prior_mean, prior_variance), Gaussian(observed_mean, observed_variance)
            mean, variance = update(prior, observed, gain)
        scale = (variance + settings.eps).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = -scale * mean if bias is None else bias - scale * mean
        y = passes.affine(view, scale, shift)
        if mean is observed_mean:  # an autograd function must not return one tensor twice
            mean, variance = mean.clone(), variance.clone()
        # `.data`, because what follows may write in place into y, which autograd forbids for a view.
        return passes.unrows(y.to(x.dtype), x).data, mean, variance, observed_mean, observed_variance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the activation and O(G·C) numbers, no more than batch normalization keeps."""
        x, prior_mean, prior_variance, gain, weight, bias, settings, groups = inputs
        _, mean, variance, observed_mean, observed_variance = output
        ctx.mark_non_differentiable(observed_mean, observed_variance)
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.groups, ctx.has_bias = settings, groups, bias is not None
        ctx.save_for_backward(
            x, prior_mean, prior_variance, gain, weight, mean, variance, observed_mean, observed_variance
        )

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, grad_mean: Tensor | None, grad_variance: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        """The closed form of the module's docstring."""
        x, prior_mean, prior_variance, gain, weight, mean, variance, observed_mean, observed_variance = (
            ctx.saved_tensors
        )
        if dy is None:
            dy = torch.zeros_like(x)
        view, gradient = passes.rows(x, ctx.groups), passes.rows(dy, ctx.groups, like=x)
        total, weighted = passes.weighted_sums(gradient, view, mean)
        inverse = (variance + ctx.settings.eps).rsqrt()
        scale = inverse if weight is None else inverse * weight
        gm = -scale * total
        gv = -0.5 * scale * inverse.square() * weighted
        gm = gm if grad_mean is None else gm + grad_mean
        gv = gv if grad_variance is None else gv + grad_variance
        g_weight = (inverse * weighted).sum(0) if weight is not None else None
        g_bias = total.sum(0) if ctx.has_bias else None
        g_prior_mean = g_prior_variance = g_gain = None
        gx, gs = gm, gv
        if prior_mean is not None:
            q = _effective_gain(prior_variance, observed_variance, gain, ctx.settings)
            d = observed_mean - prior_mean
            cross = 2 * q * (1 - q) * d * gv
            gx, gs = q * gm + cross, q * gv
            g_prior_mean = ((1 - q) * gm - cross).sum_to_size(prior_mean.shape)
            g_prior_variance = ((1 - q) * gv).sum_to_size(prior_variance.shape)
            to_gain = gv * (observed_variance - prior_variance + (1 - 2 * q) * d.square())
            to_gain = gm * d + torch.where(gv == 0, gv, to_gain)  # 0 · ∞ where a variance overflows
            to_gain = to_gain.clamp(-_LARGEST, _LARGEST)  # infinities of both signs must not meet in the sum
            g_gain = torch.where(q == gain, to_gain, torch.zeros_like(to_gain)).sum().to(gain.dtype)
        count = view.positions
        slope, offset = 2 / count * gs, (gx - 2 * gs * observed_mean) / count
        dx = passes.unrows(passes.affine_pair(gradient, view, (scale, slope, offset)).to(x.dtype), x)
        return dx, g_prior_mean, g_prior_variance, g_gain, g_weight, g_bias, None, None


def _effective_gain(prior: Tensor, observed: Tensor, gain: Tensor, settings: FilterSettings) -> Tensor:
    return gain if math.isinf(settings.guard_limit) else guard(prior, observed, gain, settings.guard_limit)
