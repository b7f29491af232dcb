"""Optimizers that were built before a conversion."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from small_models import SmallResNet, images, step
from torch import nn

from bkn_core.convert import convert, to_batch_norm
from bkn_core.layers.stale_optimizers import _watches


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        step(model, images())
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["bkn", "gn"])
def test_an_optimizer_of_the_old_model_is_warned_of_once(kind: str) -> None:
    old = SmallResNet()
    early = torch.optim.SGD(old.parameters(), 0.1)
    model = convert(old, images(), kind=kind)
    with pytest.warns(UserWarning, match=r"SGD was built before bkn\.convert") as caught:
        steps(model, early, 4)
    assert len(caught) == 1


def test_the_way_back_is_watched_as_well() -> None:
    model = convert(SmallResNet(), images())
    early = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="built before"):
        steps(to_batch_norm(model), early, 2)


def test_two_models_that_are_trained_beside_each_other_are_no_mistake() -> None:
    old = SmallResNet()
    model = convert(old, images())
    both = [torch.optim.SGD(m.parameters(), 0.1) for m in (old, model)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(old, images()), step(model, images())
            for one in both:
                one.step()


def test_nothing_watches_longer_than_it_must() -> None:
    watches = _watches()
    watches.clear()
    model, dropped = convert(SmallResNet(), images()), convert(SmallResNet(), images())
    assert len(watches) == 2
    steps(model, torch.optim.SGD(model.parameters(), 0.1), 1)
    assert len(watches) == 1
    del dropped
    gc.collect()
    steps(model, torch.optim.SGD(model.parameters(), 0.1), 1)
    assert not watches
    for _ in range(3):
        convert(SmallResNet(), images())
        gc.collect()
    assert len(watches) == 1
