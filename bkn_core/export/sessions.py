"""An exported file as something that classifies images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bkn_core.data.preprocess import Preprocess
from bkn_core.errors import InputError
from bkn_core.export.graph import to_bytes
from bkn_core.export.inspection import AGAIN, read_model
from bkn_core.export.metadata import FileMetadata
from bkn_core.export.providers import create_session, run_session


@dataclasses.dataclass(frozen=True)
class OnnxModel:
    """An exported classifier in ONNX Runtime; any number of threads may call it.

    Args:
        session: the ONNX Runtime session.
        metadata: what the file says about itself.
        provider: what runs it.
        fell_back: why "auto" left a GPU idle that PyTorch finds, or None.
    """

    session: Any
    metadata: FileMetadata
    provider: str
    fell_back: str | None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of the logits."""
        return self.metadata.classes

    @property
    def preprocess(self) -> Preprocess:
        """How a picture becomes the input."""
        return self.metadata.preprocess

    @property
    def norm(self) -> dict[str, Any]:
        """Kind of normalization, statistics, folding."""
        return self.metadata.norm

    def logits(self, images: Any) -> Any:
        """Classify normalized images.

        Args:
            images: a NumPy array or a tensor of float32.

        Shape:
            (N, C, H, W) -> (N, classes), of the kind and on the device of `images`.

        Raises:
            InputError: images of another shape.
        """
        channels = len(self.preprocess.mean)
        wanted = (channels, *self.preprocess.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
            raise InputError(f"images have the shape {tuple(images.shape)}; this file takes (N, {wanted})")
        if isinstance(images, Tensor):
            return torch.from_numpy(run_session(self.session, images.float().cpu().numpy())).to(images.device)
        return run_session(self.session, np.asarray(images, np.float32))


def open_session(path: Path | str, device: str = "auto") -> OnnxModel:
    """Open a file that `bkn export` wrote.

    Args:
        path: the file.
        device: "auto", "cpu", "cuda" or "cuda:N". "auto" prefers CUDA and says why a GPU is left idle.

    Raises:
        InputError: no such file, or none that this library wrote.
        DeviceError: CUDA was asked for and ONNX Runtime does not run on it.
    """
    proto = read_model(Path(path))
    try:
        entries = FileMetadata.from_texts({entry.key: entry.value for entry in proto.metadata_props})
    except InputError as error:
        raise InputError(f"{path} is refused: {error.message}", error.hint or AGAIN) from error
    images, logits = (
        [dim.dim_value for dim in part[0].type.tensor_type.shape.dim][1:]
        for part in (proto.graph.input, proto.graph.output)
    )
    made = [len(entries.preprocess.mean), *entries.preprocess.image_size]
    if images != made:
        raise InputError(f"{path} takes images of {images}, but its preprocessing makes {made}")
    if logits != [len(entries.classes)]:
        raise InputError(f"{path} gives {logits[0]} logits for {len(entries.classes)} names of classes")
    graph = to_bytes(proto)
    del proto
    opened = create_session(graph, device)
    return OnnxModel(opened.session, entries, opened.provider, opened.fell_back)
