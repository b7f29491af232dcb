"""Weights that no parameter determines: there is no prior, and a reason."""

from __future__ import annotations

import pytest
import torch
from brute_force import Base, images
from torch import Tensor
from torch.nn import functional as F

from bkn_core.graph.trace import trace


class Dynamic(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.stem(x)))
        return self.bn2(F.conv2d(h, self.conv1.weight * torch.sigmoid(h.mean())))


class RandomWeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.stem(x)))
        return self.bn2(F.conv2d(h, torch.bernoulli(self.conv1.weight.sigmoid())))


class WrittenWeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.stem(x)))
        with torch.no_grad():
            self.conv1.weight[0].mul_(2)
        return self.bn2(self.conv1(h))


EXAMPLE = images(3)


@pytest.mark.parametrize("kind", [Dynamic, RandomWeight, WrittenWeight])
def test_weight_that_no_parameter_determines_has_no_prior(kind: type[Base]) -> None:
    graph = trace(kind(), EXAMPLE)
    assert "bn2" not in graph.priors and graph.reasons["bn2"]
    assert set(graph.priors) | set(graph.reasons) == {"bn1", "bn2", "bn3"}
    assert not set(graph.priors) & set(graph.reasons)
