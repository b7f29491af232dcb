"""The published architectures: all convert, none computes anything else afterwards, nearly every layer has a prior."""

from __future__ import annotations

import warnings

import pytest
import torch
from architectures import Architecture, architectures
from conversion import Coverage, cover
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import bkn_core as bkn

pytest.importorskip("timm")

TRAINED = (
    Architecture("resnet18", "resnet", "torchvision"),
    Architecture("mobilenet_v3_small", "mobilenet", "torchvision"),
    Architecture("shufflenet_v2_x0_5", "shufflenet", "torchvision"),
    Architecture("densenet121", "densenet", "torchvision"),
    Architecture("googlenet", "googlenet", "torchvision"),
    Architecture("mc3_18", "video", "torchvision"),
    Architecture("efficientformerv2_s0", "efficientformer_v2", "timm"),
    Architecture("fastvit_t8", "fastvit", "timm"),
    Architecture("mobileone_s0", "byobnet", "timm"),
    Architecture("mobilevitv2_050", "mobilevit", "timm"),
)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_published_architectures_are_converted() -> None:
    found: list[Coverage] = []
    for architecture in architectures():
        coverage = cover(architecture)
        assert coverage.error is None or coverage.error <= 1e-5, architecture.name
        found.append(coverage)
    timm = [c for c in found if c.architecture.library == "timm"]
    assert len(timm) >= 100 and len({c.architecture.family for c in timm}) >= 40
    assert sum(c.error is not None for c in found) > 0.8 * len(found)
    assert sum(c.with_prior for c in found) >= 0.97 * sum(c.after_first for c in found)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TRAINED, ids=lambda architecture: architecture.name)
def test_converted_architecture_trains(architecture: Architecture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # models warn about themselves
        plain = architecture.build()
    images = architecture.images(architecture.sides()[0] if architecture.library == "torchvision" else 128, 2)
    if architecture.name == "efficientformerv2_s0":
        images = architecture.images(224, 2)
    model = bkn.convert(plain, images, statistics_batch_size=2, input_prior=images).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    labels = torch.tensor([0, 1])
    for _ in range(20):
        logits = next(iter(pytree.tree_leaves(model(torch.randn_like(images)))))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert all(t.isfinite().all() for t in [*model.parameters(), *model.buffers()])
