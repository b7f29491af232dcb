"""Moments of a Gaussian per channel, pushed through the operations that stand between two normalization layers.

Each function takes and returns a `Gaussian` of shape (..., C). Channels are taken as independent, and so are the taps
of a convolution; what that ignores is absorbed by the layer's correction and inflation (`batch_kalman.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bkn_core.filter.autograd import with_signature
from bkn_core.filter.kalman import Gaussian

_VARIANCE_FLOOR = 1e-12  # under the square roots: a layer with γ = 0 predicts variance 0 and must keep finite gradients


def convolution(message: Gaussian, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Gaussian:
    """Moments after a convolution or a linear map.

        mean_o = b_o + Σ_i m_i Σ_t W[o,i,t],   var_o = Σ_i v_i Σ_t W[o,i,t]²

    Stride and dilation do not matter; zero padding is ignored.

    Args:
        message: m, v of the input channels.
        weight: W.
        bias: b or None.
        groups: groups of the convolution.

    Shape:
        message (..., I), weight (O, I / groups, *taps), bias (O,) -> (..., O).
    """
    mean, variance = _Convolution.apply(message.mean, message.variance, weight, groups)
    return Gaussian(mean if bias is None else mean + bias, variance)


@with_signature
class _Convolution(torch.autograd.Function):
    """One node that reads W once forward and once backward instead of keeping W-sized temporaries."""

    @staticmethod
    def forward(mean: Tensor, variance: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        matrix, per_tap = _taps(weight, groups)
        return _matrix(per_tap(mean), matrix, groups), _matrix(per_tap(variance), matrix * matrix, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        mean, variance, weight, ctx.groups = inputs
        ctx.save_for_backward(mean, variance, weight)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        mean, variance, weight = ctx.saved_tensors
        matrix, per_tap = _taps(weight, ctx.groups)
        to_matrix = _outer(grad_variance, per_tap(variance), ctx.groups).mul_(matrix)
        to_matrix = torch.add(_outer(grad_mean, per_tap(mean), ctx.groups), to_matrix, alpha=2)
        to_mean = _matrix_transposed(grad_mean, matrix, ctx.groups)
        to_variance = _matrix_transposed(grad_variance, matrix * matrix, ctx.groups)
        return (
            _over_taps(to_mean, weight),
            _over_taps(to_variance, weight),
            _untaps(to_matrix, weight, ctx.groups),
            None,
        )


def _is_channels_last(weight: Tensor) -> bool:
    return weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def _taps(weight: Tensor, groups: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return W as a matrix (O, I · taps) in the order of its memory, and what lays a message out for its columns."""
    count = weight[0, 0].numel()
    if _is_channels_last(weight) and groups == 1:
        return weight.movedim(1, -1).flatten(1), lambda message: _tiled(message, count)
    return weight.flatten(1), lambda message: message.repeat_interleave(count, -1) if count > 1 else message


def _tiled(message: Tensor, count: int) -> Tensor:
    """Lay a message `count` times behind itself: cheaper than `repeat`."""
    leading = message.shape[:-1]
    return message.unsqueeze(-2).expand(*leading, count, -1).reshape(*leading, -1)


def _over_taps(values: Tensor, weight: Tensor) -> Tensor:
    """Add up what the taps of each input channel contribute: (..., I · taps) -> (..., I)."""
    count, inputs = weight[0, 0].numel(), values.shape[-1] // weight[0, 0].numel()
    if count == 1:
        return values
    if _is_channels_last(weight) and inputs == weight.shape[1]:
        return values.view(*values.shape[:-1], count, inputs).sum(-2)
    return values.view(*values.shape[:-1], inputs, count).sum(-1)


def _untaps(matrix: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Give a matrix in the order of `_taps` the shape of W."""
    if _is_channels_last(weight) and groups == 1:
        return matrix.view(len(weight), *weight.shape[2:], weight.shape[1]).movedim(-1, 1)
    return matrix.view(weight.shape)


def _matrix(vector: Tensor, matrix: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return vector @ matrix.T
    blocks = matrix.view(groups, -1, matrix.shape[1])
    return torch.einsum("...gi,goi->...go", vector.view(*vector.shape[:-1], groups, -1), blocks).flatten(-2)


def _matrix_transposed(vector: Tensor, matrix: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return vector @ matrix
    blocks = matrix.view(groups, -1, matrix.shape[1])
    return torch.einsum("...go,goi->...gi", vector.reshape(*vector.shape[:-1], groups, -1), blocks).flatten(-2)


def _outer(rows: Tensor, columns: Tensor, groups: int) -> Tensor:
    if groups == 1 and rows.dim() == columns.dim() == 1:
        return torch.outer(rows, columns)
    rows = rows.reshape(-1, groups, rows.shape[-1] // groups)
    columns = columns.reshape(-1, groups, columns.shape[-1] // groups)
    return torch.einsum("bgo,bgi->goi", rows, columns).flatten(0, 1)


def relu(message: Gaussian) -> Gaussian:
    """Moments of max(X, 0).

        E = √v e(a),   var = v (Φ(a) - e(a) e(-a)),   a = m / √v,   e(a) = a Φ(a) + φ(a)

    This form of the variance subtracts no large numbers, so float32 is enough.
    """
    return Gaussian(*_ReLU.apply(message.mean, message.variance))


@with_signature
class _ReLU(torch.autograd.Function):
    """∂E/∂m = Φ, ∂E/∂v = φ / 2√v, ∂var/∂m = 2 E (1-Φ), ∂var/∂v = Φ - e φ."""

    @staticmethod
    def forward(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        variance = variance.clamp_min(_VARIANCE_FLOOR)
        deviation = variance.sqrt()
        a = mean / deviation
        cdf, pdf = _cdf(a), _pdf(a)
        above, below = torch.addcmul(pdf, a, cdf), torch.addcmul(pdf, a, _cdf(-a), value=-1)
        return deviation * above, (variance * torch.addcmul(cdf, above, below, value=-1)).clamp_min_(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = ctx.saved_tensors
        floored = variance.clamp_min(_VARIANCE_FLOOR)
        deviation = floored.sqrt()
        a = mean / deviation
        cdf, pdf = _cdf(a), _pdf(a)
        above = torch.addcmul(pdf, a, cdf)
        to_mean = torch.addcmul(grad_mean * cdf, grad_variance * deviation, above * _cdf(-a), value=2)
        to_variance = grad_variance * torch.addcmul(cdf, above, pdf, value=-1)
        to_variance = torch.addcmul(to_variance, grad_mean, pdf / deviation, value=0.5)
        return to_mean, to_variance * (variance >= _VARIANCE_FLOOR)


def _cdf(a: Tensor) -> Tensor:
    return torch.erfc(a * -math.sqrt(0.5)) * 0.5


def _pdf(a: Tensor) -> Tensor:
    return torch.exp(-0.5 * a.square()) * (1 / math.sqrt(2 * math.pi))


def leaky_relu(message: Gaussian, slope: float | Tensor) -> Gaussian:
    """Moments of max(X, 0) + s min(X, 0) = s X + (1-s) max(X, 0), with cov(X, max(X, 0)) = v Φ(a)."""
    variance = message.variance.clamp_min(_VARIANCE_FLOOR)
    positive = relu(message)
    shared = variance * _cdf(message.mean / variance.sqrt())
    rest = 1 - slope
    mean = slope * message.mean + rest * positive.mean
    return Gaussian(mean, slope * slope * variance + rest * rest * positive.variance + 2 * slope * rest * shared)


def clipped(message: Gaussian, low: float, high: float) -> Gaussian:
    """Moments of min(max(X, low), high), taken about m so that nothing large cancels.

    E - m = l Φ(α) + h (1-Φ(β)) + √v (φ(α) - φ(β)),   E2 = l² Φ(α) + h² (1-Φ(β)) + v (Φ(β)-Φ(α)) + √v (l φ(α) - h φ(β))
    with l = low - m, h = high - m, α = l / √v, β = h / √v.
    """
    mean, variance = message.mean, message.variance.clamp_min(_VARIANCE_FLOOR)
    deviation = variance.sqrt()
    lower, upper = low - mean, high - mean
    alpha, beta = lower / deviation, upper / deviation
    below, above = _cdf(alpha), _cdf(-beta)
    first = lower * below + upper * above + deviation * (_pdf(alpha) - _pdf(beta))
    second = lower.square() * below + upper.square() * above + variance * (1 - below - above)
    second = second + deviation * (lower * _pdf(alpha) - upper * _pdf(beta))
    return Gaussian(mean + first, (second - first.square()).clamp_min(0))


def thresholded(message: Gaussian, low: float, high: float, value: float) -> Gaussian:
    """Moments of X outside (low, high) and of a value inside, taken about m.

    With d = value - m, P = Φ(β) - Φ(α), α = (low - m) / √v, β = (high - m) / √v:
    E - m = d P + √v (φ(β) - φ(α)),   E2 = d² P + v (1 - P + β φ(β) - α φ(α))
    """
    mean, variance = message.mean, message.variance.clamp_min(_VARIANCE_FLOOR)
    deviation = variance.sqrt()
    alpha, beta = ((bound - mean).div(deviation).clamp(-40, 40) for bound in (low, high))
    inside = torch.where(alpha > 0, _cdf(-alpha) - _cdf(-beta), _cdf(beta) - _cdf(alpha))
    first = (value - mean) * inside + deviation * (_pdf(beta) - _pdf(alpha))
    second = (value - mean).square() * inside + variance * (1 - inside + beta * _pdf(beta) - alpha * _pdf(alpha))
    return Gaussian(mean + first, (second - first.square()).clamp_min(0))


def elementwise(message: Gaussian, function: Callable[[Tensor], Tensor]) -> Gaussian:
    """Moments of f(X) by the trapezoidal rule on 81 points per channel, from -8 to 8 standard deviations.

    Accurate to rounding for smooth f, and to a few parts in a thousand where f has a kink.
    """
    points, mass = quadrature(message)
    values = function(points)
    mean = (mass * values).sum(0)
    return Gaussian(mean, (mass * (values - mean).square()).sum(0))


def quadrature(message: Gaussian) -> tuple[Tensor, Tensor]:
    """Return points of each channel's distribution and their mass: (81, ..., C) and (81, 1, ...)."""
    nodes, weights = _nodes()
    shape = (-1, *([1] * message.mean.dim()))
    points = torch.tensor(nodes, dtype=message.mean.dtype, device=message.mean.device).view(shape)
    mass = torch.tensor(weights, dtype=message.mean.dtype, device=message.mean.device).view(shape)
    return message.mean + message.variance.clamp_min(_VARIANCE_FLOOR).sqrt() * points, mass


@functools.cache
def _nodes() -> tuple[list[float], list[float]]:
    nodes = [i / 5 for i in range(-40, 41)]
    weights = [math.exp(-0.5 * node * node) for node in nodes]
    return nodes, [weight / sum(weights) for weight in weights]


def add(first: Gaussian, second: Gaussian) -> Gaussian:
    """Moments of X + Y, taken as independent: means add, variances add."""
    return Gaussian(first.mean + second.mean, first.variance + second.variance)


def multiply(first: Gaussian, second: Gaussian) -> Gaussian:
    """Moments of X Y, taken as independent: var = v w + v n² + w m²."""
    variance = first.variance * second.variance
    variance = variance + first.variance * second.mean.square() + second.variance * first.mean.square()
    return Gaussian(first.mean * second.mean, variance)


def affine(message: Gaussian, scale: float | Tensor, shift: float | Tensor) -> Gaussian:
    """Moments of a X + c."""
    return Gaussian(message.mean * scale + shift, message.variance * (scale * scale))


def concatenate(messages: Sequence[Gaussian]) -> Gaussian:
    """Moments of channels laid side by side; a message without a group dimension serves every group."""
    groups = max(messages, key=lambda message: message.mean.dim()).mean.shape[:-1]
    parts = [[t.expand(*groups, t.shape[-1]) for t in message] for message in messages]
    return Gaussian(torch.cat([mean for mean, _ in parts], -1), torch.cat([variance for _, variance in parts], -1))


def gather(message: Gaussian, index: Tensor) -> Gaussian:
    """Moments of channels picked, repeated or reordered."""
    return Gaussian(message.mean[..., index], message.variance[..., index])


def patches(weight: Tensor, bias: Tensor | None, mean: Tensor, covariance: Tensor) -> Gaussian:
    """Moments of a convolution whose input patches have known mean p and covariance P: exact for every W.

        mean = W p + b,   var = rowsum((W P) ∘ W)

    Shape:
        weight (O, I, *taps), mean (d,), covariance (d, d), or (d,) where only variances are known -> (O,);
        d = I · taps.
    """
    matrix = weight.flatten(1)
    full = covariance.dim() == 2
    variance = ((matrix @ covariance) * matrix).sum(1) if full else matrix.square() @ covariance
    expected = matrix @ mean
    return Gaussian(expected if bias is None else expected + bias, variance.clamp_min(0))
