"""Weights that stay centred: against PyTorch's own parametrization, and in training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import bkn_core as bkn
from bkn_core.centred_weights import CentredWeights, centred_weights
from bkn_core.errors import ConversionError

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
}


class Centred(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True)


def network() -> nn.Sequential:
    """Three layers that norms read, a depthwise and a transposed convolution, and an end without a norm."""
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8))
    more = (nn.Conv2d(8, 6, 3, groups=2), nn.GroupNorm(2, 6), nn.ConvTranspose2d(6, 4, 2), nn.InstanceNorm2d(4))
    return nn.Sequential(*layers, *more, nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


NAMES = ("0", "5", "10")


def losses(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(6):
        images = 2 + torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=generator)
        loss = model(images).square().mean() + model(images)[:, 0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_weights_that_are_computed_without_a_mean(name: str) -> None:
    model = network().double()
    computed = copy.deepcopy(model)
    for layer in NAMES:
        parametrize.register_parametrization(computed.get_submodule(layer), "weight", Centred())
    optimizer = OPTIMIZERS[name](model)
    assert bkn.keep_weights_centred_(model, optimizer, torch.randn(4, 3, 8, 8, dtype=torch.float64)) == NAMES
    expected = losses(computed, OPTIMIZERS[name](computed))
    torch.testing.assert_close(losses(model, optimizer), expected, rtol=1e-9, atol=0)
    for layer in NAMES:
        own, other = model.get_submodule(layer).weight, computed.get_submodule(layer).weight
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)
        assert own.flatten(1).mean(1).abs().max() < 1e-15  # type: ignore[operator]


def test_a_gradient_that_is_not_there_is_left_alone() -> None:
    weight = nn.Parameter(torch.ones(2, 3) * torch.tensor([1.0, 2.0, 3.0]))
    centred = CentredWeights([weight])
    centred.centre_gradients_()
    assert torch.equal(weight, torch.tensor([[-1.0, 0.0, 1.0]]).expand(2, 3)) and weight.grad is None


def test_means_of_16_bits_are_taken_in_32() -> None:
    weight = nn.Parameter(torch.full((1, 4096), 300.0, dtype=torch.float16))
    CentredWeights([weight])
    assert torch.equal(weight, torch.zeros_like(weight))


def test_nothing_to_centre_is_said() -> None:
    with pytest.raises(ConversionError, match="no normalization layer reads a convolution or linear layer whose"):
        centred_weights(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), torch.randn(2, 3, 4, 4))
