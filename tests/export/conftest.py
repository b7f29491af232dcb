"""A shorthand for exporting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drawn_models import CLASSES, drawn_images, drawn_model, preprocess_of
from torch import Tensor, nn

from bkn_core.export.onnx_file import ExportResult, export_model

Exporter = Callable[..., ExportResult]


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """Export a model to `path`, by default into a folder of its own."""

    def run(model: nn.Module, images: Tensor, path: Path | None = None, **options: Any) -> ExportResult:
        settings: dict[str, Any] = {
            "example": images[:2],
            "images": images,
            "classes": CLASSES,
            "preprocess": preprocess_of(images),
            "source": {"model": "drawn", "weights_sha256": "0" * 64},
        }
        path = path or tmp_path_factory.mktemp("export") / "model.onnx"
        return export_model(model, path, **(settings | options))

    return run


@pytest.fixture(scope="session")
def small(export: Exporter) -> Path:
    """The small model, converted, folded and exported."""
    return export(drawn_model(), drawn_images(), statistics_batch_size=2).path
