"""What an ONNX file says about itself, as JSON text in its metadata."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.engine.preprocess import Preprocess
from bkn_core.errors import InputError
from bkn_core.export.graph import package_version
from bkn_core.norm.baselines import BatchRenorm, FrozenNorm
from bkn_core.norm.layers import BatchKalmanNorm
from bkn_core.norm.rivals.group_kalman import GroupKalmanNorm
from bkn_core.norm.rivals.groups import Rival
from bkn_core.norm.rivals.response import EvoNorm, FilterResponseNorm
from bkn_core.norm.rivals.weights import StandardizedWeight

RIVALS = Rival | StandardizedWeight | FilterResponseNorm | EvoNorm | GroupKalmanNorm
SCHEMA = "bkn.onnx/1"
_KEYS = ("bkn.schema", "bkn.version", "classes", "norm", "parity", "preprocess", "source", "task")


@dataclasses.dataclass(frozen=True)
class FileMetadata:
    """The metadata of an exported file.

    Args:
        classes: names in the order of the logits.
        preprocess: how a picture becomes the input.
        norm: kind, stats, folded, statistics_batch_size.
        source: model, weights_sha256.
        parity: max_abs, top1_agreement, images, provider.
        version: of this package, when the file was written.
    """

    classes: tuple[str, ...]
    preprocess: Preprocess
    norm: dict[str, Any]
    source: dict[str, Any]
    parity: dict[str, Any]
    version: str = dataclasses.field(default_factory=package_version)

    def texts(self) -> dict[str, str]:
        """Return the entries of `metadata_props`."""
        values = {
            "bkn.schema": SCHEMA,
            "bkn.version": self.version,
            "task": "classify",
            "classes": list(self.classes),
            "preprocess": self.preprocess.to_dict(),
            "norm": self.norm,
            "source": self.source,
            "parity": self.parity,
        }
        return {key: json.dumps(value, ensure_ascii=False, allow_nan=False) for key, value in values.items()}

    @classmethod
    def from_texts(cls, texts: Mapping[str, str]) -> FileMetadata:
        """Read the entries back.

        Raises:
            InputError: entries are missing, damaged, or of another schema.
        """
        missing = [key for key in _KEYS if key not in texts]
        if missing:
            raise InputError(f"the ONNX file lacks the metadata {', '.join(missing)}", "Export it with bkn export.")
        try:
            values = {key: json.loads(texts[key]) for key in _KEYS}
        except (ValueError, RecursionError) as error:
            raise InputError("the ONNX file's metadata is no JSON text", "Export it again.") from error
        return cls._checked(values)

    @classmethod
    def _checked(cls, values: dict[str, Any]) -> FileMetadata:
        if values["bkn.schema"] != SCHEMA:
            raise InputError(f"bkn.schema is {values['bkn.schema']!r}; this version reads {SCHEMA!r}")
        classes = values["classes"]
        if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
            raise InputError("the metadata `classes` is no list of names", "Export the file again.")
        for key in ("preprocess", "norm", "source", "parity"):
            if not isinstance(values[key], dict):
                raise InputError(f"the metadata `{key}` is no JSON object", "Export the file again.")
        try:
            preprocess = Preprocess.from_dict(values["preprocess"])
        except (TypeError, OverflowError) as error:
            raise InputError(f"the metadata `preprocess` is damaged: {error}", "Export the file again.") from error
        norm, source, parity = (values[key] for key in ("norm", "source", "parity"))
        return cls(tuple(classes), preprocess, norm, source, parity, str(values["bkn.version"]))


def norm_kind(model: nn.Module) -> str:
    """Name the normalization of a model as recipes do, by its layers."""
    layers = list(model.modules())
    rival = next((layer.kind for layer in layers if isinstance(layer, RIVALS)), None)
    if rival is not None:
        return rival
    groups = [(layer.num_groups, layer.num_channels) for layer in layers if isinstance(layer, nn.GroupNorm)]
    kalman = [layer for layer in layers if isinstance(layer, BatchKalmanNorm)]
    found = {
        "bkn": any(layer.expects_prior or float(layer.gain.detach()) < 1 for layer in kalman),
        "brn": any(isinstance(layer, BatchRenorm) for layer in layers),
        "frozen": any(isinstance(layer, FrozenNorm) for layer in layers),
        "bn": any(isinstance(layer, _BatchNorm) for layer in layers),
        "ln": bool(groups) and all(count == 1 for count, _ in groups),
        "in": bool(groups) and all(count == channels for count, channels in groups),
        "gn": bool(groups),
    }
    return next((kind for kind, is_there in found.items() if is_there), "none")
