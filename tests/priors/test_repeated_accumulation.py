"""Optimizer steps one after another with priors computed once each: what is kept serves as if it were made anew."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_accumulation import (
    LABELS,
    accumulate,
    assert_same,
    converted,
    frozen,
    gradients,
    held_still,
    laid_out_otherwise,
    parts,
    tied,
    twin,
    watched,
)
from torch import nn
from torch.nn import functional as F

import bkn_core as bkn


def replaced_parameter(model: nn.Module) -> None:
    model.block[0].weight = nn.Parameter(model.block[0].weight.detach() * 1.5)


def replaced_module(model: nn.Module) -> None:
    old, model.block[3] = model.block[3], nn.Conv2d(6, 4, 1)
    model.block[3].load_state_dict({name: 1.5 * value for name, value in old.state_dict().items()})


def replaced_values(model: nn.Module) -> None:
    model.block[0].weight.data = model.block[0].weight.detach() * 1.5


def stepped(model: nn.Module) -> None:
    torch.optim.SGD(model.parameters(), lr=0.1).step()


CHANGES = [stepped, watched, tied, frozen, laid_out_otherwise, replaced_parameter, replaced_module, replaced_values]


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_sees_what_has_changed_since_the_last(change: Callable[[nn.Module], None]) -> None:
    model = held_still(converted())
    with bkn.accumulation(model):
        accumulate(model)
    change(model)
    model.zero_grad()
    other = twin(model)
    for _ in range(2):
        with bkn.accumulation(model):
            accumulate(model)
    accumulate(other)
    assert_same(gradients(model), accumulate(other))


def test_inflations_of_a_block_are_those_of_separate_forwards() -> None:
    model = converted()
    other = twin(model)
    for x in parts():
        with bkn.accumulation(model):
            F.cross_entropy(model(x), LABELS).backward()
        F.cross_entropy(other(x), LABELS).backward()
    assert_same(gradients(model), gradients(other))
    # The sensitivity that was gathered is taken into use at the end of the block here, and by the next forward there.
    buffers = [{n: b for n, b in m.named_buffers() if not n.endswith("sensitivity")} for m in (model, other)]
    assert_same(*buffers)


def test_a_backward_pass_in_a_later_block_is_refused() -> None:
    model = converted()
    with bkn.accumulation(model):
        accumulate(model)
        late = F.cross_entropy(model(parts()[0]), LABELS)
    with (
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
        bkn.accumulation(model),
    ):
        late.backward()
