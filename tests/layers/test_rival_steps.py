"""A training step with other authors' normalizations never waits for a value: it runs where tensors have none."""

from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch
from torch import nn

from bkn_core.convert import convert
from bkn_core.kinds import Rivals


@pytest.mark.parametrize("kind", get_args(Rivals))
def test_a_step_reads_no_value(kind: str) -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    images = torch.randn(6, 3, 8, 8)
    model = convert(nn.Sequential(*layers), images, kind=kind, statistics_batch_size=2).to("meta").train()
    model(images.to("meta")).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta tensors"):
        model(images.to("meta")).sum().item()


@pytest.mark.parametrize("kind", ["iternorm", "gkn"])
def test_statistics_keep_their_precision_among_mixed_ones(kind: str) -> None:
    images = torch.randn(6, 8, 5, 5)
    model = convert(nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8)), images, kind=kind, statistics_batch_size=2)
    expected = copy.deepcopy(model)(images)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images), expected, rtol=1e-6, atol=1e-6)


def test_what_is_kept_of_patches_has_its_precision_among_mixed_ones() -> None:
    images = torch.randn(6, 8, 5, 5)
    model = convert(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), images, kind="cbn", statistics_batch_size=2)
    given: list[torch.Tensor] = []
    model[1].register_forward_pre_hook(lambda _, arguments: given.append(arguments[0].float()))
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
    patches = torch.stack([part.mean((0, 2, 3)) for part in images.split(2)])
    seen = torch.stack([part.mean((0, 2, 3)) for part in given[0].split(2)])
    torch.testing.assert_close(model[1].patch_past[-3:, 0], patches, rtol=1e-5, atol=1e-6)
    expected = seen - patches @ model[0].weight.flatten(1).T
    torch.testing.assert_close(model[1].mean_past[-3:], expected.detach(), rtol=0, atol=1e-5)
