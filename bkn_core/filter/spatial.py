"""Moments of a Gaussian per channel, pushed through operations that treat positions unequally or mix them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bkn_core.filter.kalman import Gaussian
from bkn_core.filter.propagate import quadrature


def transposed_convolution(
    message: Gaussian,
    weight: Tensor,
    bias: Tensor | None,
    *,
    groups: int,
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Gaussian:
    """Moments over all positions after a transposed convolution, borders left out.

    The outputs at phase f of the stride are reached by the taps t with t · dilation = f (mod stride):

        mean_of = b_o + Σ_i m_i Σ_{t in f} W[i,o,t],   var_of = Σ_i v_i Σ_{t in f} W[i,o,t]²

    and the moments over all positions are mean_o = E_f mean_of, var_o = E_f var_of + Var_f mean_of.

    Shape:
        message (..., I), weight (I, O / groups, *taps), bias (O,) -> (..., O).
    """
    table = phases(weight, stride, dilation)
    matrix = weight.reshape(groups, -1, weight.shape[1], table.shape[0])
    leading = message.mean.shape[:-1]
    mean, variance = (t.reshape(*leading, groups, -1) for t in message)
    means = torch.einsum("...gi,giof->...gof", mean, matrix @ table).flatten(-3, -2)
    variances = torch.einsum("...gi,giof->...gof", variance, matrix.square() @ table).flatten(-3, -2)
    expected = means.mean(-1)
    return Gaussian(expected if bias is None else expected + bias, variances.mean(-1) + means.var(-1, correction=0))


def phases(weight: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Return which phase of the stride each tap reaches: (taps, phases), all axes flattened.

    Args:
        weight: of the taps, in its last dimensions.
        stride: per axis.
        dilation: per axis.
    """
    table = weight.new_ones(1, 1)
    for taps, step, spread in zip(weight.shape[2:], stride, dilation, strict=True):
        reached = torch.arange(taps, device=weight.device) * spread % step
        table = torch.kron(table, F.one_hot(reached, step).to(weight.dtype))
    return table


def maximum(message: Gaussian, function: Callable[[Tensor], Tensor], count: float) -> Gaussian:
    """Moments of the maximum of k independent f(X), by quadrature on the k-th power of their distribution.

    Args:
        message: moments of X.
        function: f.
        count: k, not necessarily whole.
    """
    points, mass = quadrature(message)
    values = function(points)
    values, order = values.sort(0)
    below = mass.expand_as(values).gather(0, order).cumsum(0).clamp(max=1).pow(count)
    mass = below.diff(dim=0, prepend=torch.zeros_like(below[:1]))
    mass = mass / mass.sum(0)
    mean = (mass * values).sum(0)
    return Gaussian(mean, (mass * (values - mean).square()).sum(0))


def over_positions(parameter: Tensor, place: int) -> Gaussian:
    """Moments of a parameter over the positions that it differs between; `place` is the dimension of its channels."""
    rows = parameter.unsqueeze(0).movedim(place, -1).flatten(0, -2)
    return Gaussian(rows.mean(0), rows.var(0, correction=0))


def normalized(message: Gaussian, groups: int, eps: float, *, is_pointwise: bool) -> Gaussian:
    """Moments after normalization within groups of n channels, over all positions or at each position by itself.

        mean_c = (m_c - m̄) / s,   var_c = v_c / s²,   s² = v̄ + mean (m_c - m̄)² + ε

    At each position by itself the mean of n channels is random too: v_c becomes v_c (1 - 2/n) + v̄ / n and v̄ in s²
    becomes v̄ (1 - 1/n). That s² is random as well is left out, so groups should not be small.
    """
    mean, variance = (t.reshape(*t.shape[:-1], groups, -1) for t in message)
    count = mean.shape[-1]
    mean = mean - mean.mean(-1, keepdim=True)
    average = variance.mean(-1, keepdim=True)
    if is_pointwise:
        variance = variance * (1 - 2 / count) + average / count
        average = average * (1 - 1 / count)
    square = average + mean.square().mean(-1, keepdim=True) + eps
    return Gaussian((mean / square.sqrt()).flatten(-2), (variance / square).flatten(-2))
