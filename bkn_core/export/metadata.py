"""What an ONNX file says about itself, as JSON text in its metadata."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.data.preprocess import Preprocess
from bkn_core.errors import InputError
from bkn_core.export.graph import package_version
from bkn_core.export.inspection import AGAIN
from bkn_core.kinds import Kind
from bkn_core.layers.baselines import BatchRenorm, FrozenNorm
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.layers.rivals.group_kalman import GroupKalmanNorm
from bkn_core.layers.rivals.groups import Rival
from bkn_core.layers.rivals.response import EvoNorm, FilterResponseNorm
from bkn_core.layers.rivals.weights import StandardizedWeight
from bkn_core.recipe_sections import Count, DataConfig, NonNegative, Section, Text
from bkn_core.recipe_words import first_fault

RIVALS = Rival | StandardizedWeight | FilterResponseNorm | EvoNorm | GroupKalmanNorm
SCHEMA = "bkn.onnx/1"
_KEYS = ("bkn.schema", "bkn.version", "classes", "norm", "parity", "preprocess", "source", "task")
_Folded = Annotated[Literal["affine", "conv", "matrix"] | None, Field(description="affine, conv, matrix or null")]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="64 hexadecimal digits")]
_Fraction = Annotated[float, Field(ge=0, le=1, description="a number from 0 to 1")]
_OwnData = Annotated[DataConfig | None, Field(description="a mapping of the keys of data in a recipe, or null")]


class NormFacts(Section):
    """How an exported model normalizes."""

    kind: Kind
    stats: Literal["population", "batch"]
    folded: _Folded
    statistics_batch_size: Annotated[Count | None, Field(description="an integer of at least 1, or null")]


class SourceFacts(Section):
    """Where the weights of an exported model come from."""

    model: Text
    weights_sha256: _Digest
    data: _OwnData = None


class ParityFacts(Section):
    """How an exported file was compared with its model."""

    max_abs: NonNegative
    top1_agreement: _Fraction
    images: Count
    provider: Text


class _Facts(Section):
    """Everything that a file says of itself, but for the preprocessing."""

    version: Text
    task: Literal["classify"]
    classes: Annotated[list[str], Field(min_length=1, description="a list of names")]
    norm: Annotated[NormFacts, Field(description="a mapping")]
    source: Annotated[SourceFacts, Field(description="a mapping")]
    parity: Annotated[ParityFacts, Field(description="a mapping")]


@dataclasses.dataclass(frozen=True)
class FileMetadata:
    """The metadata of an exported file.

    Args:
        classes: names in the order of the logits.
        preprocess: how a picture becomes the input.
        norm: what `NormFacts` says.
        source: what `SourceFacts` says.
        parity: what `ParityFacts` says.
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
            raise InputError(f"it lacks the metadata {', '.join(missing)}", AGAIN)
        try:
            values = {key: json.loads(texts[key]) for key in _KEYS}
        except (ValueError, RecursionError) as error:
            raise InputError("its metadata is no JSON text", AGAIN) from error
        if values.pop("bkn.schema") != SCHEMA:
            raise InputError(f"its bkn.schema is {texts['bkn.schema']:.80}; this version reads {SCHEMA!r}", AGAIN)
        preprocess = values.pop("preprocess")
        if not isinstance(preprocess, dict):
            raise InputError("its metadata `preprocess` is no JSON object", AGAIN)
        facts = {key.removeprefix("bkn."): value for key, value in values.items()}
        try:
            _Facts.model_validate(facts)
        except ValidationError as error:
            raise InputError(f"its metadata {first_fault(error, _Facts, facts)}", AGAIN) from error
        norm, source, parity = (facts[key] for key in ("norm", "source", "parity"))
        return cls(
            tuple(facts["classes"]), Preprocess.from_dict(preprocess), norm, source, parity, str(facts["version"])
        )


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
