"""A step does not depend on how its statistics groups are split over replicas, as over processes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bkn_core as bkn
from bkn_core.engine.models import build_network


def gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the mean loss, by a replica."""
    replica = copy.deepcopy(model)
    F.cross_entropy(replica(images), labels).backward()
    return torch.cat([p.grad.flatten() for p in replica.parameters() if p.grad is not None])


@pytest.mark.parametrize("size", [1, 2])
def test_two_halves_in_replicas_have_the_gradient_of_the_whole(size: int) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 12, 12), torch.randint(10, (16,))
    network = build_network("cifar_resnet8", classes=10, channels=3)
    model = bkn.convert(network, images[:2], statistics_batch_size=size, input_prior=images)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(4):  # which gives the inflations a gradient
        optimizer.zero_grad()
        F.cross_entropy(model(images + 0.1 * torch.randn_like(images)), labels).backward()
        optimizer.step()
    model(images)  # takes into use what the last backward gathered
    whole = gradient(model, images, labels)
    halves = [gradient(model, x, y) for x, y in zip(images.chunk(2), labels.chunk(2), strict=True)]
    assert (whole - (halves[0] + halves[1]) / 2).norm() < 1e-4 * whole.norm()
    without = copy.deepcopy(model)
    for layer in without.modules():
        if isinstance(layer, bkn.BatchKalmanNorm2d):
            layer.sensitivity.zero_()
    assert (whole - gradient(without, images, labels)).norm() > 0.01 * whole.norm()
