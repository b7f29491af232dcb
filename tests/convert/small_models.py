"""Small models to convert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.convert import convert

VARIANTS: list[dict[str, Any]] = [{}, {"message": "raw"}, {"transition": "learned"}]
every_variant = pytest.mark.parametrize("options", VARIANTS, ids=str)
LABELS = torch.arange(8) % 4


class SmallResNet(nn.Module):
    """A stem, one residual block, a head with a one-dimensional norm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.layer = Block()
        self.linear, self.bn4, self.out = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(F.relu(self.bn1(self.conv1(x))))
        h = F.relu(self.bn4(self.linear(F.adaptive_avg_pool2d(h, 1).flatten(1))))
        result: Tensor = self.out(h)
        return result


class Block(nn.Module):
    """relu(bn3(conv3(relu(bn2(conv2(x))))) + x)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x))))) + x)


def pretrained(model: nn.Module) -> nn.Module:
    """Draw all that a normalization layer learns."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.3)
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.5, 2)
                module.num_batches_tracked.add_(7)  # type: ignore[operator]
    return model


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 8, 8) + 0.3


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def step(model: nn.Module, x: Tensor) -> Tensor:
    """One forward and backward; the loss."""
    loss = F.cross_entropy(model(x), LABELS[: len(x)])
    loss.backward()
    return loss.detach()


def converted(options: dict[str, Any], **more: Any) -> nn.Module:
    """A trained-looking small ResNet, converted."""
    x = images()
    return convert(pretrained(SmallResNet()), x, input_prior=x, **{"gain": 0.3, **options, **more}).train()
