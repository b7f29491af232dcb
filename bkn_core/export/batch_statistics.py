"""Normalization of every image by its own statistics in plain operations, so that ONNX can hold it."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.convert import fold
from bkn_core.errors import ConversionError
from bkn_core.filter.kalman import Gaussian, diagonal, guard, normalize, root_above, update
from bkn_core.layers.batch_kalman import GUARD_LIMIT, BatchKalmanNorm
from bkn_core.layers.factory import BatchKalmanNormAct
from bkn_core.layers.surgery import replaced
from bkn_core.priors.hooks import PriorHooks, find_hooks


class ImageNorm(nn.Module):
    """Normalize each image by the blend of its own moments with a constant prior.

        v̂ + ε = q S + q(1-q) d² + [(1-q) v' + ε],   y = (x - x̄ + (1-q) d) γ / sqrt(v̂ + ε) + β,   d = x̄ - µ'

    Every constant is computed in float64 and kept in float32; without a prior q is 1.

    Args:
        name: path of the layer that this one stands for.
        layer: that layer.
        prior: µ', v' in float64, or None.

    Shape:
        x (N, C, *spatial) -> the same.
    """

    def __init__(self, name: str, layer: BatchKalmanNorm, prior: Gaussian | None) -> None:
        super().__init__()
        self.name, self.gain = name, 1.0 if prior is None else float(layer.gain.detach())
        ones = torch.ones(layer.num_features, dtype=torch.float64)
        mean, variance = Gaussian(0 * ones, 0 * ones) if prior is None else prior
        constants = {
            "prior_mean": mean,
            "floor": (1 - self.gain) * variance + layer.eps,
            "weight": ones if layer.weight is None else layer.weight,
            "bias": 0 * ones if layer.bias is None else layer.bias,
        }
        for key, value in constants.items():
            self.register_buffer(key, value.detach().flatten().float())

    def forward(self, x: Tensor) -> Tensor:
        """Observe, update, apply."""
        _check_values(self.name, x, has_prior=self.gain < 1)
        shape = (1, -1, *([1] * (x.dim() - 2)))
        prior_mean, floor, weight, bias = (
            self.get_buffer(key).view(shape) for key in ("prior_mean", "floor", "weight", "bias")
        )
        axes = tuple(range(2, x.dim()))
        mean = x.mean(axes, keepdim=True) if axes else x
        centred = x - mean
        variance = _mean_square(centred, axes, keepdim=True) * self.gain + floor if axes else floor
        if self.gain == 1:
            return centred * (weight / variance.sqrt()) + bias
        difference = mean - prior_mean
        scale = weight / (difference * difference * (self.gain * (1 - self.gain)) + variance).sqrt()
        shift = difference * (1 - self.gain) * scale + bias
        return centred * scale + shift if axes else shift


class LiveImageNorm(BatchKalmanNorm):
    """A Batch Kalman layer whose prior depends on each image's own posteriors.

    It does what its parent does with a statistics batch size of 1, without ever counting the images of the batch.

    Args:
        name: path of the layer that this one stands for.
        layer: that layer, whose contents are taken over.
    """

    def __init__(self, name: str, layer: BatchKalmanNorm) -> None:
        self.__dict__.update(layer.__dict__)
        self.name = name

    @property
    def uses_batch_statistics(self) -> bool:
        """Always: so the hooks serve it."""
        return True

    def forward(self, x: Tensor, prior: Gaussian | None = None) -> Tensor:
        """Normalize every image and pass its posterior on."""
        context, forward = self.slots.own, self.slots.own.forward
        prior = None if forward is None else forward.prior(context.name)
        _check_values(self.name, x, has_prior=prior is not None)
        observed = _image_moments(x, covariance=self.covariance == "full")
        posterior = observed
        if prior is not None:
            gain = self.gain
            if self.guarded:
                gain = guard(diagonal(prior).variance, diagonal(observed).variance, gain, GUARD_LIMIT)
            if self.covariance == "full" and prior.variance.dim() == prior.mean.dim():
                prior = Gaussian(prior.mean, torch.diag_embed(prior.variance))
            posterior = update(prior, observed, gain)
        if forward is not None:
            forward.publish(context.name, posterior)
        return normalize(x, diagonal(posterior), self.weight, self.bias, self.eps)


class LiveImageNormAct(BatchKalmanNormAct, LiveImageNorm):
    """`LiveImageNorm` followed by the dropout and activation of the fused layer whose place it takes."""


def with_image_statistics(model: nn.Module) -> tuple[nn.Module, int]:
    """Return a copy whose Batch Kalman layers normalize every image by itself, and how many layers those are.

    Priors that depend on parameters only become constants. Others stay in the forward. Layers of other kinds with
    population statistics are folded, since no trained blend of theirs could stand for a single image.

    Args:
        model: as `convert` returns it, on the CPU, in float32.

    Raises:
        ConversionError: for a layer that keeps no statistics of either kind.
    """
    hooks = _hooks(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BatchKalmanNorm)}
    if hooks is not None and hooks.graph.priors and not hooks.is_static:
        return replaced(model, set(layers), _live).eval(), len(layers)
    priors = _constant_priors(model)

    def build(name: str, norm: _BatchNorm) -> nn.Module:
        assert isinstance(norm, BatchKalmanNorm)
        return ImageNorm(name, norm, priors.get(name))

    return fold(replaced(model, set(layers), build)), len(layers)


def _live(name: str, norm: _BatchNorm) -> nn.Module:
    assert isinstance(norm, BatchKalmanNorm)
    return (LiveImageNormAct if isinstance(norm, BatchKalmanNormAct) else LiveImageNorm)(name, norm)


def _hooks(model: nn.Module) -> PriorHooks | None:
    try:
        return find_hooks(model)[1]
    except ConversionError:
        return None


@torch.no_grad()
def _constant_priors(model: nn.Module) -> dict[str, Gaussian]:
    """Compute, in float64, the priors that depend on parameters only, by the layers' paths in `model`."""
    if _hooks(model) is None:
        return {}
    replica = copy.deepcopy(model).double()
    root, hooks = find_hooks(replica)
    paths = {module: path for path, module in replica.named_modules()}
    return {paths[root.get_submodule(name)]: prior for name, prior in hooks.priors(root).items()}


def _image_moments(x: Tensor, *, covariance: bool) -> Gaussian:
    flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    mean = flat.mean(2)
    centred = flat - mean.unsqueeze(2)
    if covariance:
        scaled = centred / root_above(flat.shape[2])
        return Gaussian(mean, scaled @ scaled.mT * (root_above(flat.shape[2]) ** 2 / flat.shape[2]))
    return Gaussian(mean, _mean_square(centred, (2,)))


def _mean_square(values: Tensor, axes: tuple[int, ...], *, keepdim: bool = False) -> Tensor:
    """Return the mean of squares, which leaves the range of float32 only where the mean itself does."""
    count = math.prod(values.shape[axis] for axis in axes)
    scaled = values * (1 / root_above(count))
    return (scaled * scaled).sum(axes, keepdim=keepdim) * (root_above(count) ** 2 / count)


def _check_values(name: str, x: Tensor, *, has_prior: bool) -> None:
    if not has_prior and x.shape[2:].numel() == 1:
        raise ConversionError(
            f"{name} has one value per channel in each image and no prior, so a single image has no variance there",
            "Export with --stats population.",
        )
