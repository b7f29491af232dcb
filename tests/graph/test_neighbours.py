"""What stands around a normalization layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bkn_core.graph.neighbours import neighbours


class Net(nn.Module):
    """A convolution, a normalization and whatever follows."""

    def __init__(self, then: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.relu, self.then = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, self.norm(self.conv(x)))


X = torch.randn(2, 3, 5, 4)


def test_a_convolution_before_and_a_relu_behind_are_found() -> None:
    found = neighbours(Net(lambda net, y: net.relu(y).mean((2, 3))), X)
    assert (found.before, found.behind, found.positions) == ({"norm": "conv"}, {"norm": "relu"}, {"norm": 20})


@pytest.mark.parametrize(
    "then",
    [
        lambda net, y: F.relu(y),
        lambda net, y: net.relu(y) + y,
        lambda net, y: net.relu(y + 1),
        lambda net, y: net.relu(net.relu(y)),
        lambda net, y: (net.relu(y), y),
    ],
    ids=["a function", "a sum too", "something between", "twice", "an output too"],
)
def test_a_relu_that_is_not_alone_with_the_layer_is_none(then: Callable[[Net, Tensor], Tensor]) -> None:
    assert neighbours(Net(then), X).behind == {}


def test_what_stands_between_convolution_and_layer_parts_them() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.BatchNorm2d(4), nn.Linear(4, 2))
    assert neighbours(model, X).before == {}


def test_a_layer_that_runs_twice_has_no_neighbours() -> None:
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU(), nn.Conv2d(4, 4, 1), norm, nn.ReLU())
    found = neighbours(model, X)
    assert (found.before, found.behind, found.order) == ({}, {}, [])
