"""Filter Response Normalization and EvoNorm-S0 against loops of their formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bkn_core.convert import convert
from bkn_core.layers.rivals.response import EvoNorm, FilterResponseNorm


def drawn(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.double()


@pytest.mark.parametrize("shape", [(4, 6, 3, 5), (4, 6), (2, 6, 7), (2, 6, 2, 2, 3)])
@pytest.mark.parametrize("learns_eps", [False, True])
def test_filter_response_equals_its_formula(shape: tuple[int, ...], learns_eps: bool) -> None:
    layer = drawn(FilterResponseNorm(6, 1e-3, learns_eps=learns_eps))
    x = torch.randn(shape, dtype=torch.float64)
    expected = np.empty(shape)
    for n in range(shape[0]):
        for c in range(6):
            values = x[n, c].numpy()
            eps = 1e-3 + (abs(layer.learned_eps.item()) if learns_eps else 0)
            y = layer.weight[c].item() * values / np.sqrt((values**2).mean() + eps) + layer.bias[c].item()
            expected[n, c] = np.maximum(y, layer.threshold[c].item())
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(layer, x[:1].clone().requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("shape", [(4, 6, 3, 5), (4, 6), (2, 6, 7), (2, 6, 2, 2, 3)])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_evonorm_equals_its_formula(shape: tuple[int, ...], groups: int) -> None:
    layer = drawn(EvoNorm(6, 1e-3, groups=groups))
    x = torch.randn(shape, dtype=torch.float64)
    gamma, beta, slope = (p.detach().numpy() for p in (layer.weight, layer.bias, layer.slope))
    expected, size = np.empty(shape), 6 // groups
    for n in range(shape[0]):
        for c in range(6):
            values, first = x[n, c].numpy(), c // size * size
            deviation = np.sqrt(x[n, first : first + size].numpy().var() + 1e-3)
            expected[n, c] = gamma[c] * values / (1 + np.exp(-slope[c] * values)) / deviation + beta[c]
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(layer, x[:1].clone().requires_grad_(), fast_mode=True)


class Functional(nn.Module):
    """The same as modules in a row, with the activation as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


@pytest.mark.parametrize("kind", ["frn", "evonorm"])
def test_a_relu_of_its_own_gives_way_and_another_stays(kind: str) -> None:
    x = torch.randn(2, 3, 4, 4)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    converted = convert(model, x, kind=kind)
    assert isinstance(converted[2], nn.Identity) and isinstance(model[2], nn.ReLU)
    kept = convert(Functional(), x, kind=kind)
    assert (kept(x) >= 0).all()
    if kind == "frn":
        assert converted[1].threshold is not None and converted[4].threshold is None and kept.norm.threshold is None


def test_epsilon_is_learned_where_an_image_has_one_value_per_channel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 8), nn.BatchNorm1d(8))
    converted = convert(model, torch.randn(2, 3, 2, 2), kind="frn")
    assert converted[1].learned_eps is None and converted[4].learned_eps.item() == pytest.approx(1e-4)
