"""Activation checkpointing of both kinds changes neither gradients nor statistics, or is refused."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_models import LABELS, SmallResNet, assert_same, every_variant, gradients, images, pretrained, step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from bkn_core.convert import convert
from bkn_core.errors import ConversionError

Run = Callable[..., Tensor]


class Checkpointed(SmallResNet):
    """The block, and the head, run again in the backward pass."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.again(self.layer, h)
        h = F.adaptive_avg_pool2d(h, 1).flatten(1)
        h = self.again(lambda t: F.relu(self.bn4(self.linear(t))), h)
        result: Tensor = self.out(h)
        return result

    def again(self, part: Run, h: Tensor) -> Tensor:
        result: Tensor = checkpoint(part, h, use_reentrant=self.reentrant)
        return result


class Reentrant(Checkpointed):
    reentrant = True


class Nested(Reentrant):
    """A part that runs again holds a part that runs again."""

    def again(self, part: Run, h: Tensor) -> Tensor:
        return super().again(lambda t: super(Nested, self).again(part, t) * 1, h)


class Whole(SmallResNet):
    """Everything before the head in one part."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)
        return result


@pytest.mark.parametrize("form", [Checkpointed, Reentrant, Nested, Whole])
def test_checkpointing_changes_neither_gradients_nor_statistics(form: type[nn.Module]) -> None:
    x = images()
    plain = pretrained(SmallResNet())
    saving = form()
    saving.load_state_dict(plain.state_dict())
    models = [convert(m, x, input_prior=x).train().double() for m in (plain, saving)]
    for _ in range(3):
        for model in models:
            step(model, x.detach().double())
    assert_same(gradients(models[0]), gradients(models[1]), 1e-9)
    assert_same(dict(models[0].named_buffers()), dict(models[1].named_buffers()), 1e-9)


def test_inflation_that_moved_before_the_recomputation_is_not_used() -> None:
    x = images()
    plain = pretrained(SmallResNet())
    saving = Reentrant()
    saving.load_state_dict(plain.state_dict())
    models = [convert(m, x, input_prior=x, gain=0.3).train().double() for m in (plain, saving)]
    for model in models:
        step(model, x.double())  # whose first forward moves the inflations as far as they can
    assert_same(gradients(models[0]), gradients(models[1]), 1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_whole_model_is_as_without(reentrant: bool) -> None:
    x = images()
    model = convert(pretrained(SmallResNet()), x, input_prior=x, gain=0.3).train()
    state = {n: b.clone() for n, b in model.named_buffers()}
    step(model, x)
    expected = gradients(model)
    model.zero_grad()
    model.load_state_dict(state, strict=False)
    F.cross_entropy(checkpoint(model, x.requires_grad_(), use_reentrant=reentrant), LABELS).backward()
    assert_same(expected, gradients(model), 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_sequences_train(reentrant: bool) -> None:
    plain = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU()) for _ in range(4)), nn.AdaptiveAvgPool2d(1)
    )

    class Sequence(nn.Module):
        def __init__(self, parts: int) -> None:
            super().__init__()
            self.stem, self.parts, self.count = nn.Conv2d(3, 6, 1), plain, parts

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            if not self.count:
                result: Tensor = self.parts(h)
                return result
            return checkpoint_sequential(self.parts, self.count, h, use_reentrant=reentrant)

    torch.manual_seed(1)
    models = [convert(Sequence(parts), images()).train() for parts in (0, 2, 4)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    x = images()
    for model in models:
        model(x).square().sum().backward()
    assert_same(gradients(models[0]), gradients(models[1]), 1e-5)
    assert_same(gradients(models[0]), gradients(models[2]), 1e-5)


@pytest.mark.slow
def test_checkpointing_inside_a_compiled_model() -> None:
    x = images()
    model = convert(pretrained(Checkpointed()), x, input_prior=x, gain=0.3).train()
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: other(x), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(step(compiled, x), step(model, x))
    assert_same(gradients(model), gradients(other), 1e-6)


@contextlib.contextmanager
def refused_as(words: str) -> Iterator[None]:
    with pytest.raises(ConversionError, match=words):
        yield


@pytest.mark.parametrize("form", [Checkpointed, Reentrant])
@every_variant
def test_messages_of_the_forward_are_recomputed_or_refused(options: dict[str, Any], form: type[Checkpointed]) -> None:
    x = images()
    model = convert(pretrained(form()), x, input_prior=x, **options).train()
    refused = bool(options) and (form is Reentrant or options.get("message") == "raw")
    with refused_as("checkpoint") if refused else contextlib.nullcontext():
        step(model, x)
