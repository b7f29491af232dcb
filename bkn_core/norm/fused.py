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
from bkn_core.norm.kalman import Gaussian, Moments, guard, spread_over_images, update

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
    mean, variance = prior if prior is not None else (None, None)
    y, posterior_mean, posterior_variance, observed_mean, observed_variance = _KalmanNormalize.apply(
        x, mean, variance, gain, weight, bias, settings
    )
    count = images_per_group(len(x), settings.statistics_batch_size, observed_mean)[:, 0] * x.shape[2:].numel()
    return y, Gaussian(posterior_mean, posterior_variance), Moments(observed_mean, observed_variance, count)


def images_per_group(images: int, statistics_batch_size: int | None, like: Tensor) -> Tensor:
    """Return the number of images of each group as a column (G, 1) of the type and on the device of `like`."""
    size = min(statistics_batch_size or images, images)
    column = like.new_full((-(-images // size), 1), size)
    if images % size:
        column[-1:].fill_(images % size)  # filled on the device: a copy from the host would wait for it
    return column


def _over_groups(values: Tensor, size: int) -> Tensor:
    """Average per-image rows within each group: (N, C) -> (G, C)."""
    if size == 1:
        return values
    body = len(values) // size * size
    mean = values[:body].view(-1, size, values.shape[1]).mean(1)
    return mean if body == len(values) else torch.cat([mean, values[body:].mean(0, keepdim=True)])


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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Observe, update, apply."""
        size = min(settings.statistics_batch_size or len(x), len(x))
        view = passes.rows(x)
        image_mean, image_variance = passes.image_moments(view)
        observed_mean, observed_variance = image_mean, image_variance
        if size > 1:
            observed_mean = _over_groups(image_mean, size)
            within = image_mean - _to_images(observed_mean, len(x), size)
            observed_variance = _over_groups(image_variance + within.square(), size)
        mean, variance = observed_mean, observed_variance
        if prior_mean is not None and prior_variance is not None:
            gain = _effective_gain(prior_variance, observed_variance, gain, settings)
            prior, observed = Gaussian(prior_mean, prior_variance), Gaussian(observed_mean, observed_variance)
            mean, variance = update(prior, observed, gain)
        scale = (variance + settings.eps).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = -scale * mean if bias is None else bias - scale * mean
        y = passes.affine(view, _to_images(scale, len(x), size), _to_images(shift, len(x), size))
        if mean is observed_mean:  # an autograd function must not return one tensor twice
            mean, variance = mean.clone(), variance.clone()
        # `.data`, because what follows may write in place into y, which autograd forbids for a view.
        return passes.unrows(y.to(x.dtype), x).data, mean, variance, observed_mean, observed_variance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the activation and O(G·C) numbers, no more than batch normalization keeps."""
        x, prior_mean, prior_variance, gain, weight, bias, settings = inputs
        _, mean, variance, observed_mean, observed_variance = output
        ctx.mark_non_differentiable(observed_mean, observed_variance)
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.has_bias = settings, bias is not None
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
        size = min(ctx.settings.statistics_batch_size or len(x), len(x))
        if dy is None:
            dy = torch.zeros_like(x)
        view, gradient = passes.rows(x), passes.rows(dy, like=x)
        total, weighted = passes.weighted_sums(gradient, view, _to_images(mean, len(x), size))
        images = images_per_group(len(x), size, mean)
        total, weighted = _over_groups(total, size) * images, _over_groups(weighted, size) * images
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
        count = images * view.positions
        slope, offset = 2 * gs / count, (gx - 2 * gs * observed_mean) / count
        coefficients = tuple(_to_images(c, len(x), size) for c in (scale, slope, offset))
        dx = passes.affine_pair(gradient, view, coefficients)  # type: ignore[arg-type]
        return passes.unrows(dx.to(x.dtype), x), g_prior_mean, g_prior_variance, g_gain, g_weight, g_bias, None


def _to_images(values: Tensor, images: int, size: int) -> Tensor:
    return values if size in (1, images) else spread_over_images(values, images, size)


def _effective_gain(prior: Tensor, observed: Tensor, gain: Tensor, settings: FilterSettings) -> Tensor:
    return gain if math.isinf(settings.guard_limit) else guard(prior, observed, gain, settings.guard_limit)
