"""Models with drawn parameters and statistics, so that folding has something to fold, and images for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.convert import convert
from bkn_core.data.preprocess import Preprocess
from bkn_core.engine.models import build_network

CLASSES = tuple(f"class {i}" for i in range(10))


class Small(nn.Module):
    """Two convolutions, each followed by a normalization, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, groups=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def perceptron() -> nn.Module:
    """Two hidden layers with `nn.BatchNorm1d` over 8×8 grey images."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in ((64, 24), (24, 16)):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(16, len(CLASSES)))


def drawn_images(count: int = 12, size: int = 16, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, channels, size, size, generator=generator) * 4 - 2


def drawn_model(model: nn.Module | str = "small", images: Tensor | None = None, **options: Any) -> nn.Module:
    """Draw the norms of a model, convert it, and draw what the conversion added."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if isinstance(model, str):
            model = Small() if model == "small" else build_network(model, classes=len(CLASSES))
        _draw(model)
        converted = convert(model, (drawn_images() if images is None else images)[:2], **options).eval()
        for path, parameter in converted.named_parameters():
            if "prior_" in path:
                nn.init.normal_(parameter, std=0.2)
    return converted


def preprocess_of(images: Tensor) -> Preprocess:
    channels, height, width = images.shape[1:]
    return Preprocess("L" if channels == 1 else "RGB", (height, width), (0.5,) * channels, (0.25,) * channels)


@torch.no_grad()
def _draw(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
