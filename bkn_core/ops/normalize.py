"""Normalization by the posterior as one autograd node in closed form: the path that training uses.

The plain functions in `kalman.py` say the same in a dozen nodes; tests hold the two together.
Per channel and group, with r = (v̂ + ε)^-½, d = x̄ - µ', n values and q the gain:

    forward    µ̂ = µ' + q d ;  v̂ = v' + q (S - v') + q (1-q) d² ;  y = γ r (x - µ̂) + β
    sums       G₁ = Σ dy ;  G₂ = Σ dy (x - µ̂) ;  dβ = G₁ ;  dγ = r G₂
               g_m = g_µ̂ - γ r G₁ ;  g_v = g_v̂ - ½ γ r³ G₂
    backward   gx̄ = q g_m + 2q(1-q) d g_v ;  gS = q g_v
               gµ' = (1-q) g_m - 2q(1-q) d g_v ;  gv' = (1-q) g_v ;  gq = Σ g_m d + g_v (S - v' + (1-2q) d²)
               dx = γ r dy + (2 gS / n) x + (gx̄ - 2 gS x̄) / n
    following  k = h̄ / (G (N + ε)),  l = h̄_µ / (G (N + ε)^½),  N = mean_G(S + d²) ;  h̄, h̄_µ the sensitivities
               Σ_G v' gv' and (N + ε)^½ Σ_G gµ', as far as they are remembered, see `inflation_gradient.py`
               gS += k,  gx̄ += 2 k d + l,  gµ' -= 2 k d + l,  gv' -= h̄ / (G (v' + ε))

On the CPU float32 and 16 bits go through the kernels of `kernels.py`, a GPU's tensors through those of
`cuda/normalize.py`, all else through the passes of `activation_rows.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bkn_core.filter import inflation_gradient
from bkn_core.filter.autograd import is_eager, once_differentiable, with_signature
from bkn_core.filter.inflation_gradient import Sensitivity
from bkn_core.filter.kalman import Gaussian, Groups, guard, limited
from bkn_core.filter.state import FilterSettings, FilterStatistics
from bkn_core.ops import activation_rows, backend, extension, kernels

_LARGEST_GRADIENT = 1e30  # of the gain by one channel of one group: their sum stays finite


class Filtered(NamedTuple):
    """What a layer makes of its input.

    Args:
        y: the normalized input.
        statistics: of each group and channel.
        covariance: Σ̂, where the layer carries the full matrix.
        images: how many images were observed, where that is not the length of x.

    Shape:
        y (N, C, *spatial), covariance (G, C, C).
    """

    y: Tensor
    statistics: FilterStatistics
    covariance: Tensor | None = None
    images: Tensor | None = None

    @property
    def posterior(self) -> Gaussian:
        """Return µ̂ and v̂, (G, C) each, or Σ̂ in the place of v̂."""
        return Gaussian(self.statistics.mean, self.statistics.variance if self.covariance is None else self.covariance)

    @classmethod
    def of(cls, y: Tensor, packed: Tensor) -> Filtered:
        """Name what a kernel or node returns."""
        return cls(y, FilterStatistics(packed))


def kalman_normalize(
    x: Tensor,
    prior: Gaussian | None,
    gain: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    settings: FilterSettings,
    sensitivity: Sensitivity | None = None,
) -> Filtered:
    """Normalize every group by its posterior; without a prior by what is observed in it.

    Args:
        x: activations.
        prior: µ', v' of this layer, for all groups or for each; None is batch normalization.
        gain: q in [0, 1], a scalar tensor.
        weight: γ or None.
        bias: β or None.
        settings: see `FilterSettings`.
        sensitivity: h̄, where v' holds an inflation whose gradient is to be followed; for groups of one size.

    Shape:
        x (N, C, *spatial), prior (C,) or (G, C), sensitivity (2, C).
    """
    division = Groups.of(x.shape[0], settings.statistics_batch_size)
    body = division.body
    mean, variance = prior if prior is not None else (None, None)
    if division.is_even:
        parameters, memory = (mean, variance, gain, weight, bias), sensitivity or (None, None)
        groups = division.images // division.size
        is_direct = is_eager()
        if is_direct and settings.guard_limit == math.inf:
            made = extension.normalize(x, parameters, memory, settings.eps, groups)
            if made is not None:
                return Filtered.of(*made)
        node = _Direct if is_direct else _KalmanNormalize
        return Filtered.of(*node.apply(x, *parameters, *memory, settings, groups))
    # A smaller last group is normalized on its own: rare, so its copy does not matter.
    if sensitivity is not None:
        raise ValueError("an inflation can be followed in groups of one size only")  # see `forms.normalize_by`
    parts = [
        kalman_normalize(x[:body], _part(prior, slice(None, -1)), gain, weight, bias, settings),
        kalman_normalize(x[body:], _part(prior, slice(-1, None)), gain, weight, bias, settings),
    ]
    return Filtered.of(torch.cat([part.y for part in parts]), torch.cat([part.statistics.packed for part in parts], 1))


def _part(prior: Gaussian | None, groups: slice) -> Gaussian | None:
    """Return the prior of some groups; one without a group dimension serves all."""
    if prior is None or prior.mean.dim() == 1:
        return prior
    return Gaussian(prior.mean[groups], prior.variance[groups])


@with_signature
class _KalmanNormalize(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        prior_mean: Tensor | None,
        prior_variance: Tensor | None,
        gain: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        sensitivity: Tensor | None,
        gathered: Tensor | None,
        settings: FilterSettings,
        groups: int,
    ) -> tuple[Tensor, Tensor]:
        """Observe, update, apply."""
        return _normalized(x, (prior_mean, prior_variance, gain, weight, bias), settings, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the activation and O(G·C) numbers, no more than batch normalization keeps."""
        x, prior_mean, prior_variance, gain, weight, bias, used, gathered, ctx.settings, ctx.groups = inputs
        ctx.sensitivity = None if used is None else Sensitivity(used, gathered)
        ctx.set_materialize_grads(False)
        ctx.has_bias, ctx.shape = bias is not None, None
        ctx.save_for_backward(x, prior_mean, prior_variance, gain, weight, output[1])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: tuple[Any, ...], dy: Tensor | None, grad_statistics: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The closed form of the module's docstring."""
        gradients = torch.zeros_like(saved[0]) if dy is None else dy, grad_statistics
        if ctx.shape is not None and is_eager():
            memory, eps = ctx.sensitivity or (None, None), ctx.settings.eps
            results = kernels.normalize_backward(gradients, saved, memory, eps, ctx.shape)
        else:
            results = _gradients(gradients, saved, ctx.sensitivity, ctx.settings, ctx.groups)
        dx, to_prior, to_weight, to_bias = results
        return dx, *to_prior, to_weight, to_bias if ctx.has_bias else None, None, None, None, None


class _Direct(torch.autograd.Function):
    """The same node in the form that PyTorch calls fastest, which compilation and transforms cannot take apart; by the
    CPU kernels where they can take the tensors.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Forward and context in one."""
        x, parameters, settings, groups = inputs[0], inputs[1:6], inputs[8], inputs[9]
        shape = kernels.shape_of(x, parameters, groups, inputs[6:8]) if settings.guard_limit == math.inf else None
        if shape is None:
            output = _normalized(x, parameters, settings, groups)
        else:
            output = kernels.normalize(x, parameters, settings.eps, shape)
        _KalmanNormalize.setup_context(ctx, inputs, output)
        ctx.shape = shape
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """The same."""
        return _KalmanNormalize.backward(ctx, *gradients)


def _normalized(
    x: Tensor, parameters: kernels.Parameters, settings: FilterSettings, groups: int
) -> tuple[Tensor, Tensor]:
    """The forward by Triton where it takes the tensors, else in PyTorch."""
    prior_mean, prior_variance, gain, weight, bias = parameters
    if settings.guard_limit == math.inf and backend.triton_takes(x, parameters):
        y, packed = torch.ops.bkn_cuda.normalize(x, *parameters, settings.eps, groups)
        return y, packed
    view = activation_rows.rows(x, groups)
    observed_mean, observed_variance, buffer = activation_rows.observe(view)
    mean, variance = observed_mean, observed_variance
    rest = observed_variance * (1 / (view.positions - 1)) if view.positions > 1 else torch.zeros_like(observed_variance)
    if prior_mean is not None and prior_variance is not None:
        gain = _effective_gain(prior_variance, observed_variance, gain, settings)
        difference = observed_mean - prior_mean
        surplus = _surplus(difference, observed_variance, prior_variance, 1 - gain)
        mean = torch.addcmul(prior_mean, difference, gain)
        variance = torch.addcmul(prior_variance, surplus, gain)
        rest = torch.where(gain > 0, rest * gain, torch.zeros_like(rest))  # 0 · ∞ is 0 here
    inverse = (variance + settings.eps).rsqrt_()
    scale = inverse if weight is None else inverse * weight
    shift = -scale * mean if bias is None else torch.addcmul(bias, scale, mean, value=-1)
    y = activation_rows.affine(view, scale, shift, buffer).to(x.dtype)
    statistics = torch.stack((mean, variance, observed_mean, observed_variance, variance + rest, inverse))
    # `.data`, because what follows may write in place into y, which autograd forbids for a view.
    return activation_rows.unrows(y, x).data, statistics


def _gradients(
    gradients: tuple[Tensor, Tensor | None],
    saved: tuple[Any, ...],
    sensitivity: Sensitivity | None,
    settings: FilterSettings,
    groups: int,
) -> kernels.Gradients:
    """The backward by Triton where it takes the tensors, else in PyTorch."""
    dy, grad_statistics = gradients
    x, prior_mean, prior_variance, gain, weight, statistics = saved
    memory = sensitivity or (None, None)
    vectors = prior_mean, prior_variance, gain, weight, *memory
    if settings.guard_limit == math.inf and backend.triton_takes(x, vectors):
        return _gradients_by_triton((*gradients, *saved, *memory, settings.eps, groups))
    mean, _, observed_mean, observed_variance, _, inverse = statistics.unbind()
    view, gradient = activation_rows.rows(x, groups), activation_rows.rows(dy, groups, like=x)
    total, weighted, buffer = activation_rows.weighted_sums(gradient, view, mean)
    scale = inverse if weight is None else inverse * weight
    scaled = inverse * weighted
    gm, gv = -scale * total, (scale * inverse).mul_(scaled).mul_(-0.5)
    if grad_statistics is not None:
        gm, gv = gm + grad_statistics[0], gv + grad_statistics[1]
    gx, gs = gm, gv
    to_prior: kernels.ToPrior = (None, None, None)
    if prior_mean is not None:
        q = _effective_gain(prior_variance, observed_variance, gain, settings)
        p, d = 1 - q, observed_mean - prior_mean
        cross = (gv * (2 * p * q)).mul_(d)
        to_mean, to_variance = torch.addcmul(-cross, gm, p), p * gv
        gx, gs = torch.addcmul(cross, gm, q), q * gv
        if sensitivity is not None:
            spread = limited(torch.addcmul(observed_variance, d, d))
            predicted = prior_variance.reshape(-1, spread.shape[1]).mean(0)
            weights = inflation_gradient.weights(spread, predicted, settings.eps)
            deviation = inflation_gradient.deviation(spread.mean(0), predicted, settings.eps)
            seen = torch.stack(((to_variance * prior_variance).sum(0), to_mean.sum(0) * deviation))
            inflation_gradient.gather(sensitivity.gathered, seen)
            to_ratio, push = (inflation_gradient.used(sensitivity.used, seen, len(x)).to(gv.dtype) / groups).unbind()
            share = to_ratio / (predicted + settings.eps)
            shift = torch.addcmul(push / deviation, share * weights, d, value=2)
            gx, gs, to_mean = gx + shift, gs + share * weights, to_mean - shift
            to_variance = to_variance - share * ((weights * spread).mean(0) + settings.eps) / (predicted + settings.eps)
        surplus = _surplus(d, observed_variance, prior_variance, p - q)
        to_prior = _to_prior((to_mean, to_variance), (gm, gv, d, surplus), q, gain, prior_mean.dim() == 1)
    count = view.positions
    offset = torch.addcmul(gx, gs, observed_mean, value=-2).div_(count)
    dx = activation_rows.affine_pair(gradient, view, (scale, gs * (2 / count), offset), buffer).to(x.dtype)
    return activation_rows.unrows(dx, x), to_prior, None if weight is None else scaled.sum(0), total.sum(0)


def _gradients_by_triton(arguments: tuple[Any, ...]) -> kernels.Gradients:
    _, _, _, prior_mean, _, gain, weight, *_ = arguments
    dx, to_weight, to_bias, *prior, to_gain = torch.ops.bkn_cuda.normalize_backward(*arguments)
    is_asked = not is_eager() or gain.requires_grad  # a computed gain has no gradient
    to_prior: kernels.ToPrior = (None, None, None)
    if prior_mean is not None:
        to_prior = (*prior, to_gain.sum() if is_asked else None)
    return dx, to_prior, None if weight is None else to_weight, to_bias


def _surplus(difference: Tensor, observed: Tensor, prior: Tensor, factor: Tensor) -> Tensor:
    """Return S - v' + factor d², finite where a square has overflowed: 0 · ∞ must not make a NaN of a gain of 0."""
    return torch.addcmul(limited(observed) - prior, limited(difference * difference), factor)


def _to_prior(
    parts: tuple[Tensor, Tensor], terms: tuple[Tensor, ...], q: Tensor, gain: Tensor, is_shared: bool
) -> kernels.ToPrior:
    """Return the gradients of µ', v' and the gain."""
    gm, gv, d, surplus = terms
    # Infinities of both signs must not meet in the sum.
    to_gain = torch.addcmul((gv * surplus).clamp_(-_LARGEST_GRADIENT, _LARGEST_GRADIENT), gm, d)
    if q.dim():  # groups whose prior was dropped do not depend on the gain
        to_gain = torch.where(q == gain, to_gain, torch.zeros_like(to_gain))
    to_mean, to_variance = (part.sum(0) for part in parts) if is_shared else parts
    return to_mean, to_variance, to_gain.sum().to(gain.dtype)


def _effective_gain(prior: Tensor, observed: Tensor, gain: Tensor, settings: FilterSettings) -> Tensor:
    return gain if math.isinf(settings.guard_limit) else guard(prior, observed, gain, settings.guard_limit)
