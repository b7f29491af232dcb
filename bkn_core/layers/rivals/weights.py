"""Weights of convolutions that a normalization wants without a mean, or standardized: parametrizations of PyTorch."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class CentredWeight(nn.Module):
    """W - mean(W), over all inputs of each output."""

    def forward(self, weight: Tensor) -> Tensor:
        """Take the mean off."""
        return weight - weight.flatten(1).mean(1).view(-1, *([1] * (weight.dim() - 1)))


class StandardizedWeight(nn.Module):
    """(W - mean(W)) / sqrt(var(W) + 1e-6), over all inputs of each output.

    Reference:
        Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", 1903.10520.
    """

    kind: ClassVar[str] = "gn_ws"

    def forward(self, weight: Tensor) -> Tensor:
        """Standardize."""
        variance, mean = torch.var_mean(weight.flatten(1), 1, correction=0)
        shape = (-1, *([1] * (weight.dim() - 1)))
        return (weight - mean.view(shape)) * (variance + 1e-6).rsqrt().view(shape)


class UnitWeight(nn.Module):
    """W / |W|, by the root of the sum of squares over all inputs of each output."""

    def forward(self, weight: Tensor) -> Tensor:
        """Scale."""
        norms = weight.flatten(1).square().sum(1).sqrt()
        return weight / norms.view(-1, *([1] * (weight.dim() - 1)))


def reparametrize_(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Let a convolution or linear layer, in place, use its weights so; those with a single input stay as they are."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if weight[0].numel() > 1 and not parametrize.is_parametrized(layer, "weight"):
        parametrize.register_parametrization(layer, "weight", kind())


def bake_weights_(model: nn.Module) -> None:
    """Write, in place, the weights that layers use in the place of those that they are computed from.

    `remove_parametrizations` would take the weights from every copy of the layer: copies share the class that it edits.
    """
    for module in list(model.modules()):
        parts = module._modules.get("parametrizations")
        kinds = [type(part) for part in parts.modules()] if parts is not None else []
        if kinds[2:] in ([CentredWeight], [StandardizedWeight], [UnitWeight]):  # behind the dictionary and the list
            weight = module.weight
            assert isinstance(weight, Tensor)
            del module._modules["parametrizations"]
            module.__class__ = parametrize.type_before_parametrizations(module)
            module._parameters = {"weight": nn.Parameter(weight.detach().clone()), **module._parameters}
