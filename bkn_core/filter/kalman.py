"""The filter of Batch Kalman Normalization as pure functions of tensors, one equation each.

Reference: arXiv 1802.03133, eq. 7.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """Mean (..., C) and variance (..., C) per channel; the covariance form holds (..., C, C) in `variance`."""

    mean: Tensor
    variance: Tensor


class Moments(NamedTuple):
    """Observed mean and biased (co)variance of each statistics group, and the number of values per channel (G,)."""

    mean: Tensor
    variance: Tensor
    count: Tensor  # type: ignore[assignment]  # a tuple's method of this name is not used


def group_images(images: int, statistics_batch_size: int | None) -> list[int]:
    """Return the number of images in each statistics group: `s` consecutive images, the last group maybe fewer."""
    size = min(statistics_batch_size or images, images)
    full, rest = divmod(images, size)
    return [size] * full + ([rest] if rest else [])


def moments(x: Tensor, statistics_batch_size: int | None = None, *, covariance: bool = False) -> Moments:
    """Observe the moments of every statistics group.

        x̄ = Σ x / n,   S = Σ (x - x̄)(x - x̄)ᵀ / n,   n = images in the group · values per image

    Args:
        x: activations; their statistics are computed in float32 or wider.
        statistics_batch_size: images per group, None for all of them in one group.
        covariance: the full matrix S instead of its diagonal.

    Shape:
        x (N, C, *spatial) -> mean (G, C), variance (G, C) or (G, C, C), count (G,).
    """
    flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    flat = flat.to(torch.promote_types(x.dtype, torch.float32))
    sizes = group_images(len(x), statistics_batch_size)
    body = sizes.count(sizes[0]) * sizes[0]
    parts = [_equal_groups(flat[:body], sizes[0], covariance)]
    if body < len(x):
        parts.append(_equal_groups(flat[body:], len(x) - body, covariance))
    count = torch.tensor(sizes, dtype=flat.dtype, device=x.device) * flat.shape[2]
    return Moments(torch.cat([mean for mean, _ in parts]), torch.cat([variance for _, variance in parts]), count)


def _equal_groups(flat: Tensor, size: int, covariance: bool) -> tuple[Tensor, Tensor]:
    images, channels, length = flat.shape
    values = flat.reshape(images // size, size, channels, length)
    mean, root = values.mean((1, 3)), root_above(size * length)
    centred = (values - mean[:, None, :, None]) / root
    squares = torch.einsum("gsil,gsjl->gij", centred, centred) if covariance else centred.square().sum((1, 3))
    return mean, squares / (size * length / root**2)


def root_above(count: int) -> int:
    """Return the least power of 2 that is not below the root of a count.

    The sum of `count` squares of values that were divided by it overflows no sooner than their mean, and but for that
    it has the same bits, scaled.
    """
    root = 1
    while root * root < count:
        root *= 2
    return root


def limited(squares: Tensor) -> Tensor:
    """Return squares of which the sum of two is still a number of their type."""
    return squares.clamp_max(0.499 * torch.finfo(squares.dtype).max)


def predict(previous: Gaussian, transition: Tensor, noise: Tensor) -> Gaussian:
    """Predict this layer's statistics from those of the preceding layer.

        µ' = A µ,   Σ' = A Σ Aᵀ + r I   (diagonal form: σ'² = (A∘A) σ² + r)

    Args:
        previous: posterior of the preceding layer.
        transition: A.
        noise: r >= 0, the same for all layers.

    Shape:
        previous.mean (G, C'), previous.variance (G, C') or (G, C', C'), transition (C, C')
        -> mean (G, C), variance (G, C) or (G, C, C).

    Reference:
        arXiv 1802.03133, eq. 7 (first line).
    """
    mean = previous.mean @ transition.T
    if previous.variance.dim() == previous.mean.dim():
        return Gaussian(mean, previous.variance @ transition.square().T + noise)
    identity = torch.eye(len(transition), dtype=transition.dtype, device=transition.device)
    return Gaussian(mean, transition @ previous.variance @ transition.T + noise * identity)


def rectangular_identity(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return the initial transition A (rows, columns): A[i, i mod columns] = 1, of the type and device of `like`."""
    numbers = torch.arange(rows, device=like.device)[:, None] % columns
    return (numbers == torch.arange(columns, device=like.device)).to(like.dtype)


def refine(
    prior: Gaussian,
    correction: tuple[Tensor | None, Tensor | None],
    inflations: tuple[Tensor | None, Tensor | None],
    eps: float,
) -> Gaussian:
    """Apply a learned correction δ, ρ and the inflations λ, ι to a prior.

        µ' + (δ + λ) sqrt(v' + ε),   v' exp(ρ + ι)

    What λ moves the mean by is a constant to the gradient, which follows the mean itself (`inflation_gradient.py`).

    Args:
        prior: µ', v'.
        correction: δ, ρ.
        inflations: λ, ι.
        eps: ε.

    Shape:
        (C,) or (G, C) each.
    """
    mean, variance = prior
    (offset, log_scale), (shift, inflation) = correction, inflations
    deviation = (variance + eps).sqrt()
    if offset is not None:
        mean = torch.addcmul(mean, offset, deviation)
    if shift is not None:
        mean = torch.addcmul(mean, shift, deviation.detach())
    if log_scale is not None and inflation is not None:
        variance = variance * (log_scale + inflation).exp()
    elif log_scale is not None or inflation is not None:
        exponent = log_scale if inflation is None else inflation
        assert exponent is not None
        variance = variance * exponent.exp()
    return Gaussian(mean, variance)


def update(prior: Gaussian, observed: Moments | Gaussian, gain: Tensor) -> Gaussian:
    """Blend what was predicted with what was observed.

        µ̂ = µ' + q (x̄ - µ'),   Σ̂ = (1-q) Σ' + q S + q(1-q) (x̄ - µ')(x̄ - µ')ᵀ

    Args:
        prior: µ', Σ'.
        observed: x̄, S.
        gain: q in [0, 1], a scalar or one value per group (G, 1).

    Shape:
        (G, C) or (C,) each; variances (..., C, C) in the covariance form.

    Reference:
        arXiv 1802.03133, eq. 7.
    """
    innovation = observed.mean - prior.mean
    mean = prior.mean + gain * innovation
    if observed.variance.dim() == observed.mean.dim():
        spread = innovation.square()
    else:
        spread = innovation.unsqueeze(-1) * innovation.unsqueeze(-2)
        gain = gain.unsqueeze(-1) if gain.dim() else gain
    blended = (1 - gain) * prior.variance + _weighted(gain, observed.variance)
    return Gaussian(mean, blended + _weighted(gain * (1 - gain), spread))


def _weighted(weight: Tensor, values: Tensor) -> Tensor:
    """Return weight · values, and 0 for weight 0 even where a value has overflowed."""
    return torch.where((weight != 0) | values.isfinite(), weight * values, torch.zeros_like(values))


def guard(prior_variance: Tensor, observed_variance: Tensor, gain: Tensor, limit: float) -> Tensor:
    """Return the gain of each group, 1 where the prior is to be dropped: its variance is `limit` times too large.

        q_g = 1 where mean_C(v' / S) >= limit, else q   (channels with S = 0 say nothing and count as 0)

    Shape:
        prior_variance (C,) or (G, C), observed_variance (G, C), gain () -> (G, 1).

    Reference:
        the safety gate of the authors' released code (limit 100).
    """
    ratio = torch.where(observed_variance > 0, prior_variance / observed_variance, torch.zeros_like(observed_variance))
    return torch.where(ratio.mean(-1, keepdim=True) >= limit, torch.ones_like(gain), gain)


def unbiased(posterior: Gaussian, observed: Moments, gain: Tensor | float) -> Gaussian:
    """Return the diagonal posterior with S n / (n-1) in the place of S, for the moving variance.

        v̂ + q S / (n-1)   (v̂ where n = 1)

    Shape:
        posterior and observed (G, C) -> (G, C).
    """
    seen, count = diagonal(Gaussian(observed.mean, observed.variance)).variance, observed.count[:, None]
    weight = gain * (count > 1) / (count - 1).clamp_min(1)
    mean, variance = diagonal(posterior)
    return Gaussian(mean, torch.addcmul(variance, seen, weight.to(seen.dtype)))


def average_over_groups(values: Tensor, share: Tensor | None) -> Tensor:
    """Average (..., G, C) over groups by the part of the images that each holds, or plainly where all are equal."""
    return values.mean(-2) if share is None else (share * values).sum(-2)


def diagonal(gaussian: Gaussian) -> Gaussian:
    """Return the per-channel variances of a Gaussian in either form."""
    if gaussian.variance.dim() == gaussian.mean.dim():
        return gaussian
    return Gaussian(gaussian.mean, gaussian.variance.diagonal(dim1=-2, dim2=-1))


def spread_over_images(values: Tensor, images: int, statistics_batch_size: int | None) -> Tensor:
    """Repeat each group's row once for each of its images: (G, C) -> (N, C)."""
    size = min(statistics_batch_size or images, images)
    return values.repeat_interleave(size, dim=0, output_size=len(values) * size)[:images]


def normalize(x: Tensor, posterior: Gaussian, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalize every image by its own row of statistics.

        y = γ (x - µ̂) / sqrt(diag Σ̂ + ε) + β

    Shape:
        x (N, C, *spatial), posterior (N, C), weight and bias (C,) -> (N, C, *spatial) in the type of x.
    """
    scale = (posterior.variance + eps).sqrt().reciprocal()  # the cube in the gradient of rsqrt leaves float32 early
    scale = scale if weight is None else scale * weight
    shape = (*scale.shape, *([1] * (x.dim() - 2)))
    y = (x - posterior.mean.view(shape)) * scale.view(shape)
    return (y if bias is None else y + bias.view(1, -1, *([1] * (x.dim() - 2)))).to(x.dtype)


def in_form_of(prior: Gaussian, observed: Moments) -> Gaussian:
    """Give a diagonal prior the matrix form where the observation has it."""
    if observed.variance.dim() == observed.mean.dim() or prior.variance.dim() > prior.mean.dim():
        return prior
    return Gaussian(prior.mean, torch.diag_embed(prior.variance))
