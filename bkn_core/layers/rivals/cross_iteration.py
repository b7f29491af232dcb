"""Cross-Iteration Batch Normalization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight
from torch.nn.modules.conv import _ConvNd

from bkn_core.errors import StatisticsError
from bkn_core.filter.kalman import Gaussian, group_images, moments, normalize, spread_over_images
from bkn_core.layers.rivals.groups import Rival, exactly, wide
from bkn_core.layers.rivals.handover import Handover

_WINDOW = 8  # groups, the newest among them
_BURN_IN = 1 / 20  # part of the training that normalizes by its own group alone
_GRADIENTS = {3: conv1d_weight, 4: conv2d_weight, 5: conv3d_weight}


class Read(NamedTuple):
    """What the layer before read, and that layer."""

    images: Tensor
    layer: nn.Module


class Reader:
    """A forward pre-hook of a convolution or linear layer that leaves what it reads for the normalization behind it."""

    def __init__(self, letter: Handover[Read]) -> None:
        self.letter = letter

    def __call__(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Leave it, in training."""
        self.letter.content = Read(arguments[0].detach(), layer) if layer.training else None


class CrossIterationNorm(Rival):
    """Average the statistics of the last 8 groups, as they would be with the present weights.

        µ_τ = µ(w_τ) + p_τ (w - w_τ),   ν_τ = ν(w_τ) + (∂ν/∂w)(w - w_τ),   p = ∂µ/∂w = E[patch],   ∂ν/∂w = 2 E[x patch]
        µ = mean µ_τ,   σ² = mean ν_τ - µ²,   y = γ (x - µ) / sqrt(σ² + ε) + β

    over the τ with ν_τ >= µ_τ², channel by channel. Groups of one forward share their weights, and the gradient flows
    through the statistics of all of them, of earlier forwards through none. The first 5 % of the training use their
    own group alone, and so do layers that read no convolution or linear layer, or one that pads otherwise than with
    zeros. Interpreter uses moving averages.

    Args:
        num_features: C.
        eps: ε.
        momentum: weight of the newest batch in the moving averages.
        statistics_batch_size: images per group; None is the whole batch.

    Shape:
        x (N, C, *spatial) -> the same.

    Reference:
        Yao et al., "Cross-Iteration Batch Normalization", 2002.05712.
    """

    kind = "cbn"
    mean_past: Tensor
    square_past: Tensor
    patch_past: Tensor
    slope_past: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        statistics_batch_size: int | None = None,
    ) -> None:
        super().__init__(num_features, eps, 0.1 if momentum is None else momentum)
        self.statistics_batch_size = statistics_batch_size
        self.letter: Handover[Read] | None = None

    def follow_(self, layer: nn.Module) -> None:
        """Know, from now on, the layer before: what it reads and its weights."""
        weight, groups = layer.weight, getattr(layer, "groups", 1)
        assert isinstance(weight, Tensor)
        if isinstance(layer, _ConvNd) and (isinstance(layer.padding, str) or layer.padding_mode != "zeros"):
            return
        self.letter = Handover()
        layer.register_forward_pre_hook(Reader(self.letter))
        width, rows = weight[0].numel(), _WINDOW - 1
        shapes = {"mean": (self.num_features,), "square": (self.num_features,)}
        for name, shape in {**shapes, "patch": (groups, width), "slope": (self.num_features, width)}.items():
            self.register_buffer(f"{name}_past", weight.new_zeros(rows, *shape))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, and in training remember."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        read = None if self.letter is None else self.letter.take()
        size = self.statistics_batch_size
        if min(group_images(x.shape[0], size)) * x.shape[2:].numel() < 2:
            raise StatisticsError("a statistics group has one value per channel", "Use a larger statistics_batch_size.")
        observed = moments(x, size)
        own = Gaussian(observed.mean, observed.variance)
        with exactly(x):
            joint = own if read is None else self._joint(own, read)
        with torch.no_grad(), exactly(x):
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            share = (observed.count / observed.count.sum())[:, None]
            unbiased = observed.variance * (observed.count / (observed.count - 1))[:, None]
            self.running_mean.lerp_((share * observed.mean).sum(0), self.momentum)
            self.running_var.lerp_((share * unbiased).sum(0), self.momentum)
            self.num_batches_tracked.add_(len(own.mean))
            if read is not None:
                self._remember(own, read, wide(x))
        rows = Gaussian(*(spread_over_images(values, x.shape[0], size) for values in joint))
        return normalize(x, rows, self.weight, self.bias, self.eps)

    def _joint(self, own: Gaussian, read: Read) -> Gaussian:
        """Return the moments of each group and the seven before it: (G, C)."""
        with torch.no_grad():
            weight = _weight(read)
            past_mean = self.mean_past + _applied(self.patch_past, weight)
            past_variance = self.square_past + (self.slope_past * weight).sum(2) - past_mean.square()
            number = self.seen(len(own.mean))
            ages = torch.arange(_WINDOW - 1, -1, -1, device=weight.device)
            known = (past_variance >= 0) & (ages[:-1, None] < number[0])
            known = _windows(known, torch.ones_like(own.mean, dtype=torch.bool))
            known = known & ((ages == 0) | (number > self.length * _BURN_IN)[..., None])
        means, variances = _windows(past_mean, own.mean), _windows(past_variance, own.variance)
        count = known.sum(2)
        mean = torch.where(known, means, 0.0).sum(2) / count
        spread = variances + (means - mean[..., None]).square()
        return Gaussian(mean, torch.where(known, spread, 0.0).sum(2) / count)

    def _remember(self, own: Gaussian, read: Read, x: Tensor) -> None:
        """Keep what the last groups say of other weights: their statistics as lines, a + b · w."""
        weight, size = _weight(read), min(self.statistics_batch_size or x.shape[0], x.shape[0])
        groups = min(x.shape[0] // size, _WINDOW - 1)
        first, last = x.shape[0] // size - groups, x.shape[0] // size
        patch, slope = _patches(read, x, slice(first * size, last * size), groups)
        mean, variance = (values[first:last] for values in own)
        lines = {
            "patch": patch,
            "slope": slope,
            "mean": mean - _applied(patch, weight),
            "square": variance + mean.square() - (slope * weight).sum(2),
        }
        for name, newest in lines.items():
            kept = self.get_buffer(f"{name}_past")
            kept.copy_(torch.cat([kept, newest.to(kept.dtype)])[-len(kept) :])


def _weight(read: Read) -> Tensor:
    weight = read.layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().flatten(1)


def _applied(patches: Tensor, weight: Tensor) -> Tensor:
    """Return W p of each row: patches (T, groups, d), weight (C, d) -> (T, C)."""
    found = torch.einsum("tgd,gcd->tgc", patches, weight.view(patches.shape[1], -1, weight.shape[1]))
    return found.flatten(1)


def _windows(past: Tensor, own: Tensor) -> Tensor:
    """Return each group with the seven before it: (G, C, 8), itself last."""
    return torch.cat([past, own]).unfold(0, _WINDOW, 1)


def _patches(read: Read, x: Tensor, images: slice, groups: int) -> tuple[Tensor, Tensor]:
    """Return E[patch] (T, groups, d) and 2 E[x patch] (T, C, d) of T groups, as gradients of one wide convolution."""
    layer, weight = read.layer, read.layer.weight
    assert isinstance(weight, Tensor)
    parts, outputs = wide(read.images)[images], x.detach()[images]
    if isinstance(layer, nn.Linear):
        parts, outputs, weight = parts.unsqueeze(2), outputs.unsqueeze(2), weight.unsqueeze(2)
    form = {key: getattr(layer, key) for key in ("stride", "padding", "dilation") if hasattr(layer, key)}
    inner = getattr(layer, "groups", 1)
    gradient: Callable[..., Tensor] = _GRADIENTS[parts.dim()]
    beside, size = _beside(parts, groups), len(parts) // groups

    def total(values: Tensor) -> Tensor:
        shape = (groups * values.shape[1], *weight.shape[1:])
        found = gradient(beside, shape, _beside(values, groups), groups=groups * inner, **form)
        return found.reshape(groups, values.shape[1], -1) / (size * values.shape[2:].numel())

    return total(torch.ones_like(outputs[:, :inner])), 2 * total(outputs)


def _beside(values: Tensor, groups: int) -> Tensor:
    """Lay groups side by side as channels: (T s, C, *spatial) -> (s, T C, *spatial)."""
    return values.reshape(groups, -1, *values.shape[1:]).transpose(0, 1).flatten(1, 2)
