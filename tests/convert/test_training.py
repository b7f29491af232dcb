"""Converted models in training: gradients, types, frozen layers, learning, threads."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from small_models import (
    VARIANTS,
    SmallResNet,
    assert_same,
    converted,
    every_variant,
    gradients,
    images,
    step,
)
from torch import Tensor, nn

from bkn_core.convert import convert


@every_variant
def test_frozen_layers_normalize_by_their_population(options: dict[str, Any]) -> None:
    model, x = converted(options), images()
    model.layer.bn2.eval()
    state = model.layer.bn2.running_mean.clone()
    step(model, x)
    assert torch.equal(model.layer.bn2.running_mean, state)
    model.bn1.eval(), model.layer.eval(), model.bn4.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, x)


def test_changed_models_are_refused_in_words() -> None:
    model = converted({})
    model.layer.bn2 = nn.BatchNorm2d(6)
    with pytest.raises(ValueError, match=r"layer\.bn2"):
        model(images())


def test_zero_weights_keep_gradients_finite() -> None:
    plain = SmallResNet()
    for module in (plain.bn1, plain.layer.bn2, plain.layer.bn3):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    x = images()
    model = convert(plain, x, input_prior=x)
    for _ in range(3):
        model.zero_grad()
        step(model, x)
        assert all(g.isfinite().all() for g in gradients(model).values())
    assert all(b.isfinite().all() for b in model.buffers())


@every_variant
def test_learning_moves_what_is_learned(options: dict[str, Any]) -> None:
    model, x = converted(options), images()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = None
    for _ in range(10):
        optimizer.zero_grad()
        loss = step(model, x)
        first = loss if first is None else first
        optimizer.step()
    assert first is not None and loss < first
    guarded = {"bn4.gain_logit", "bn4.transition"} if options.get("transition") == "learned" else set()
    for name, parameter in model.named_parameters():
        # With two values per channel some variance is nearly 0, so the guard drops the prior and all it depends on.
        if name == "linear.bias":  # it moves the observed and the predicted mean alike, so rounding alone moves it
            continue
        assert name in guarded or not torch.equal(parameter, before[name]), name
    if options.get("transition") == "learned":
        names = list(before)
        assert sum("transition_noise" in n for n in names) == 1, "one r for all layers"
        assert sum(n.endswith(".transition") for n in names) == 4
        assert not any("prior_offset" in n for n in names)


@every_variant
def test_same_seed_same_bits(options: dict[str, Any]) -> None:
    def run() -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = converted(options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            step(model, images())
            optimizer.step()
        return dict(model.state_dict())

    assert_same(run(), run())


def test_models_in_two_threads_do_not_hear_each_other() -> None:
    models = [converted(options) for options in VARIANTS]
    alone = [copy.deepcopy(model) for model in models]
    x = images()

    def work(model: nn.Module) -> None:
        for _ in range(3):
            step(model, x)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, reference in zip(models, alone, strict=True):
        work(reference)
        assert_same(gradients(reference), gradients(model), 1e-5)  # a new thread may split its sums otherwise
