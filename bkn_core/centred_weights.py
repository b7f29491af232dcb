"""Weights without a mean: a constraint on what an optimizer does with the layers that normalization layers read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bkn_core.errors import ConversionError
from bkn_core.graph.neighbours import neighbours


class CentredWeights:
    """Weights that keep a mean of zero over the inputs of each output while an optimizer trains them.

    Projected descent: gradients lose their mean before a step, weights after it.

        g ← g - mean(g),   W ← W - mean(W)

    Args:
        weights: (outputs, inputs ...) each; they are centred at once.
    """

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        self.weights = tuple(weights)
        self.centre_weights_()

    def centre_gradients_(self) -> None:
        """Take the mean off each gradient, in place; once more changes nothing."""
        _centre_([weight.grad for weight in self.weights if weight.grad is not None])

    def centre_weights_(self) -> None:
        """Take the mean off each weight, in place; once more changes nothing."""
        _centre_(self.weights)


@torch.no_grad()
def _centre_(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        inputs = tuple(range(1, tensor.dim()))
        mean = tensor.mean(inputs, keepdim=True, dtype=None if tensor.dtype is torch.float64 else torch.float32)
        tensor.sub_(mean)


def keep_weights_centred_(model: nn.Module, optimizer: torch.optim.Optimizer, example_input: Any) -> tuple[str, ...]:
    """Centre the weights of the layers that normalization layers read, and keep them so in each step of an optimizer.

        W ← W - mean(W),   over all inputs of each output

    What brightens all inputs of such a layer alike then leaves its outputs as they are: filters of pictures see
    differences alone, and inputs of one variance and equal correlations ρ have outputs of (1 - ρ) Σ w² v, which is the
    predicted variance but for one factor. What a network has learned with other weights is lost: call it before the
    first step. Gradients that are clipped before a step are clipped with their mean.

    Args:
        model: converted or not.
        optimizer: of all its parameters; a subclass of `torch.optim.Optimizer` whose gradients are whole tensors.
        example_input: a tensor, or a tuple or dict of the forward's arguments, for one forward that finds the layers.

    Returns:
        The paths of the layers.

    Raises:
        ConversionError: no normalization layer reads a convolution or linear layer, or the forward fails.

    Reference:
        Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization", 2001.06838,
        section 4.4 (weights); Yong et al., "Gradient Centralization", 2004.01461 (gradients).
    """
    found = centred_weights(model, example_input)
    centred = CentredWeights(found.values())
    optimizer.register_step_pre_hook(lambda *_: centred.centre_gradients_())
    optimizer.register_step_post_hook(lambda *_: centred.centre_weights_())
    return tuple(found)


def centred_weights(model: nn.Module, example_input: Any) -> dict[str, nn.Parameter]:
    """Return, by path, the weights of convolutions and linear layers that normalization layers read as they are.

    Not among them are depthwise convolutions, whose filters would see no flat area, transposed ones, each of whose
    outputs reads a part of its filter, and weights that are computed from others.

    Raises:
        ConversionError: there are none, or the forward fails on the example.
    """
    names = dict.fromkeys(neighbours(model, example_input).before.values())
    found = {name: weight for name in names if (weight := _with_mean(model.get_submodule(name))) is not None}
    if not found:
        raise ConversionError(
            "no normalization layer reads a convolution or linear layer whose weights could be centred",
            "Leave the weights as they are.",
        )
    return found


def _with_mean(layer: nn.Module) -> nn.Parameter | None:
    weight = layer.weight
    if not isinstance(weight, nn.Parameter) or parametrize.is_parametrized(layer):
        return None
    is_depthwise = getattr(layer, "groups", 1) > 1 == weight.shape[1]
    return None if is_depthwise or getattr(layer, "transposed", False) or weight[0].numel() == 1 else weight
