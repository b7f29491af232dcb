"""Models with drawn statistics, so that folding has something to fold, and a shorthand for exporting them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.convert import convert
from bkn_core.engine.models import build_network
from bkn_core.engine.preprocess import Preprocess
from bkn_core.export.onnx_file import ExportResult, export_model

CLASSES = tuple(f"class {i}" for i in range(10))
SOURCE = {"model": "drawn", "weights_sha256": "0" * 64}

Exporter = Callable[..., ExportResult]
Builder = Callable[..., nn.Module]


def preprocess_of(images: Tensor) -> Preprocess:
    channels, height, width = images.shape[1:]
    return Preprocess("L" if channels == 1 else "RGB", (height, width), (0.5,) * channels, (0.25,) * channels)


def drawn_images(count: int = 12, size: int = 16, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, channels, size, size, generator=generator) * 4 - 2


def draw_norms(model: nn.Module) -> nn.Module:
    """Give every normalization layer parameters and statistics of its own, in place."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, (_BatchNorm, nn.GroupNorm)) and module.weight is not None:
            shape = module.weight.shape
            with torch.no_grad():
                module.weight.copy_(0.5 + torch.rand(shape, generator=generator))
                module.bias.copy_(0.3 * torch.randn(shape, generator=generator))
                if isinstance(module, _BatchNorm):
                    module.running_mean.copy_(0.3 * torch.randn(shape, generator=generator))
                    module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
    return model


def build(name: str = "cifar_resnet8", *, kind: str = "bkn", size: int = 16, **options: Any) -> nn.Module:
    """Build a network by name, draw its norms and convert it."""
    torch.manual_seed(0)
    model = draw_norms(build_network(name, classes=len(CLASSES)))
    converted = convert(model, drawn_images(2, size), kind=kind, **options).eval()
    for path, parameter in converted.named_parameters():
        if "prior_" in path:
            with torch.no_grad():
                parameter.normal_(0, 0.2)
    return converted


@pytest.fixture
def export(tmp_path: Path) -> Exporter:
    """Export a model to `model.onnx` in a folder of the test's own."""

    def run(model: nn.Module, images: Tensor, name: str = "model.onnx", **options: Any) -> ExportResult:
        settings: dict[str, Any] = {
            "example": images[:2],
            "images": images,
            "classes": CLASSES,
            "preprocess": preprocess_of(images),
            "source": SOURCE,
        }
        return export_model(model, tmp_path / name, **(settings | options))

    return run
