"""Training with centred weights."""

from __future__ import annotations

import pytest
import torch
from test_training_steps import gradients
from tiny_runs import training
from torch import nn

from bkn_core.errors import RecipeError


def test_centred_weights_stay_so_and_gradients_are_centred_before_they_are_clipped() -> None:
    run = training("norm.weights=centred", "train.clip_norm=1e-3", "train.ema=0.5", "optim.name=adamw")
    centred = [module for module in run.model.modules() if isinstance(module, nn.Conv2d)]
    clipped = gradients(run)
    total = torch.stack([gradient.norm() for gradient in clipped.values()]).norm()
    torch.testing.assert_close(total, torch.tensor(1e-3), rtol=1e-3, atol=0)
    for name, module in run.model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert clipped[f"{name}.weight"].flatten(1).mean(1).abs().max() < 1e-9
    averaged = [module for module in run.evaluated.modules() if isinstance(module, nn.Conv2d)]
    for module in centred + averaged:
        assert module.weight.flatten(1).mean(1).abs().max() < 1e-7 < module.weight.abs().max()


def test_pretrained_weights_are_not_centred() -> None:
    with pytest.raises(RecipeError, match=r"norm\.weights is centred and model\.pretrained is true"):
        training("norm.weights=centred", "model.name=resnet18", "model.pretrained=true")


def test_kinds_with_weights_of_their_own_keep_them() -> None:
    assert training("norm.weights=centred", "norm.kind=gn_ws").centred.weights == ()
