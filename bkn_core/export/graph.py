"""From a PyTorch model to an ONNX graph whose bytes depend on the model alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from bkn_core.errors import ConversionError

INPUT, OUTPUT, BATCH = "input", "logits", "batch"
DIGEST = "bkn.sha256"
LARGEST = 2**31 - 2**24  # protobuf ends at 2 GB; the rest of the graph needs some of it
_NOISY = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
_SIGNATURE = re.compile(
    DIGEST.replace(".", r"\.").encode() + b'\x12\x42"([0-9a-f]{64})"'
)  # a protobuf field of 66 bytes
_CLASSES = "pkg.torch.onnx.class_hierarchy"


def package_version() -> str:
    """Return the version of this package."""
    try:
        return metadata.version("bkn")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "0"


def trace(model: nn.Module, example: Tensor, opset: int) -> Any:
    """Return the `onnx.ModelProto` of a model in evaluation mode, with a free number of images.

    Args:
        model: from images to logits.
        example: images.
        opset: version of the operator set.

    Shape:
        example (N, C, H, W) -> the graph's `input` (batch, C, H, W), `logits` (batch, classes).

    Raises:
        ConversionError: the model cannot be traced, fixes the number of images, or is too large for one file.
    """
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > LARGEST:
        raise ConversionError(f"the weights take {size / 2**30:.1f} GiB", "An ONNX file in one piece ends at 2 GiB.")
    example = example[:2] if len(example) > 1 else torch.cat([example, example])  # a batch of one would be baked in
    with quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim(BATCH)},),
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise _untraceable(model, error) from error
    assert program is not None
    proto = program.model_proto
    _check_batch(model, proto)
    return proto


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's log lines off the terminal; what matters of them is checked in the graph itself."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def nodes_of(proto: Any, module: str) -> list[str]:
    """Return the names of the nodes that classes of a Python module made; known until `canonical`."""
    return [
        node.name
        for node in proto.graph.node
        if any(entry.key == _CLASSES and f"'{module}." in entry.value for entry in node.metadata_props)
    ]


def canonical(proto: Any) -> None:
    """Strip, in place, all that says how and where the graph was made, and what nothing reads."""
    graph = proto.graph
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]
    for part in (proto, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    domains = {node.domain for node in graph.node} | {""}
    versions = [entry for entry in proto.opset_import if entry.domain in domains]
    del proto.opset_import[:]
    proto.opset_import.extend(versions)
    graph.name, proto.producer_name, proto.producer_version = "bkn", "bkn", package_version()


def set_metadata(proto: Any, texts: dict[str, str]) -> None:
    """Write, in place, the file's metadata, sorted by key."""
    del proto.metadata_props[:]
    for key in sorted(texts):
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, texts[key]


def to_bytes(proto: Any) -> bytes:
    """Return the bytes of a file with embedded weights."""
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def signed(proto: Any) -> bytes:
    """Return the bytes of a file whose metadata `bkn.sha256` is the digest of them all, its own digits read as 0."""
    kept = {entry.key: entry.value for entry in proto.metadata_props if entry.key != DIGEST}
    set_metadata(proto, kept | {DIGEST: json.dumps("0" * 64)})
    data = to_bytes(proto)
    start, end = _digits(data)
    return data[:start] + _digest(data, start, end).encode() + data[end:]


def is_signed(data: bytes) -> bool:
    """Whether the bytes of a file are, bit for bit, those that were signed."""
    start, end = _digits(data)
    return start < end and data[start:end] == _digest(data, start, end).encode()


def _digits(data: bytes) -> tuple[int, int]:
    """Return where the digits of a file's digest begin and end; nothing where it has none, or two."""
    found = [match.span(1) for match in re.finditer(_SIGNATURE, data)]
    return found[0] if len(found) == 1 else (0, 0)


def _digest(data: bytes, start: int, end: int) -> str:
    view, total = memoryview(data), hashlib.sha256()
    for part in (view[:start], b"0" * (end - start), view[end:]):
        total.update(part)
    return total.hexdigest()


def _check_batch(model: nn.Module, proto: Any) -> None:
    shapes = [value.type.tensor_type.shape for value in (*proto.graph.input, *proto.graph.output)]
    if len(shapes) != 2 or any(len(shape.dim) == 0 or shape.dim[0].dim_param != BATCH for shape in shapes):
        raise ConversionError(
            f"{type(model).__name__} fixes the number of images of a batch when it is traced",
            "Use x.shape[0] instead of len(x) in its forward, and no Python numbers made from it.",
        )


def _untraceable(model: nn.Module, error: Exception) -> ConversionError:
    cause = error.__cause__ or error
    words = str(cause).strip().splitlines() or [type(cause).__name__]
    return ConversionError(
        f"{type(model).__name__} cannot be traced for ONNX: {words[0][:300]}",
        "Its forward must not depend on the values of the images.",
    )
