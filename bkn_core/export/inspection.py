"""Reading an ONNX file that nobody vouches for: nothing of it runs before all of it was looked at."""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bkn_core.errors import InputError
from bkn_core.export.graph import BATCH, DIGEST, INPUT, OUTPUT, is_signed

_LARGEST_FILE = 2**31 - 1
_LARGEST_VALUE = 2**28  # numbers in one tensor, images counted as one: 1 GiB of float32
_LARGEST_IMAGE = 2**26
AGAIN = "Export the file again with bkn export."


def read_model(path: Path) -> Any:
    """Return the `onnx.ModelProto` of a file, refused unless it is whole, plain and of moderate size.

    Raises:
        InputError: it is missing, damaged or changed since its export, refers to other files, holds control flow or
            foreign operators, or claims tensors that it does not hold or nobody could.
    """
    data = _bytes(path)
    proto = _parsed(path, data)
    try:
        if not is_signed(data):
            raise InputError(f"it is damaged or was changed since its export: it does not have its digest {DIGEST}")
        _check_parts(proto)
        _check_ends(proto.graph)
        _check_intermediate(proto)
    except InputError as error:
        raise InputError(f"{path} is refused: {error.message}", error.hint or AGAIN) from error
    return proto


def _bytes(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is no file", "Give an .onnx file that bkn export wrote.")
        if status.st_size > _LARGEST_FILE:
            raise InputError(f"{path} has {status.st_size} bytes; an ONNX file in one piece ends at 2 GiB", AGAIN)
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}", "Check its path.") from error


def _parsed(path: Path, data: bytes) -> Any:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        proto = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise InputError(f"{path} is no ONNX file, or a damaged one", AGAIN) from error
    if not proto.graph.node:
        raise InputError(f"{path} holds no graph", AGAIN)
    return proto


def _check_parts(proto: Any) -> None:
    from onnx import AttributeProto, TensorProto

    if proto.functions or proto.training_info:
        raise InputError("it holds functions or training graphs of its own")
    for node in proto.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise InputError(f"it holds the operator {node.op_type!r} of the domain {node.domain!r}")
        if any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
            raise InputError(f"it holds control flow ({node.op_type})")
    for message in _messages(proto):
        if isinstance(message, TensorProto):
            _check_tensor(message)


def _messages(message: Any) -> Iterator[Any]:
    """Yield a protobuf message and all that it holds."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else [value]:
                yield from _messages(part)


def _check_tensor(tensor: Any) -> None:
    from onnx import TensorProto, helper, numpy_helper

    name = tensor.name[:80]
    if tensor.external_data or tensor.data_location == TensorProto.EXTERNAL:
        raise InputError(f"the tensor {name!r} lies in another file", "Files of bkn export hold their weights.")
    if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) > _LARGEST_VALUE:
        raise InputError(f"the tensor {name!r} claims the shape {list(tensor.dims)[:8]}")
    try:
        width = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:
        raise InputError(f"the tensor {name!r} has the unknown type {tensor.data_type}") from None
    if tensor.HasField("raw_data") and len(tensor.raw_data) != math.prod(tensor.dims) * width:
        raise InputError(f"the tensor {name!r} of shape {list(tensor.dims)[:8]} holds {len(tensor.raw_data)} bytes")
    if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE):
        values = numpy_helper.to_array(tensor)
        if (values != values).any():
            raise InputError(f"the tensor {name!r} holds values that are no numbers (NaN)")


def _check_ends(graph: Any) -> None:
    """Check that the graph takes images and gives logits."""
    inputs, outputs = ([(v.name, _dims(v)) for v in part] for part in (graph.input, graph.output))
    if [name for name, _ in inputs] != [INPUT] or [name for name, _ in outputs] != [OUTPUT]:
        raise InputError(f"its ends are {inputs[:4]} and {outputs[:4]}; expected are {INPUT!r} and {OUTPUT!r}")
    (_, images), (_, logits) = inputs[0], outputs[0]
    whole = len(images) == 4 and len(logits) == 2 and images[0] == logits[0] == BATCH
    sizes = [size for size in (*images[1:], *logits[1:]) if isinstance(size, int) and size > 0]
    if not whole or len(sizes) != 4:
        raise InputError(f"it maps {images} to {logits}; expected is [{BATCH}, C, H, W] to [{BATCH}, classes]")
    if math.prod(sizes[:3]) > _LARGEST_IMAGE:
        raise InputError(f"it claims images of the shape {images[1:]}")


def _check_intermediate(proto: Any) -> None:
    """Refuse operators that blow a few numbers up to a tensor nobody could hold."""
    import onnx

    del proto.graph.value_info[:]  # what the file claims of them may be a lie
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
        raise InputError(f"its shapes contradict each other: {str(error)[:200]}") from error
    for value in inferred.graph.value_info:
        sizes = [size for size in _dims(value) if isinstance(size, int)]
        if math.prod(sizes) > _LARGEST_VALUE:
            raise InputError(f"the value {value.name[:80]!r} would have the shape {_dims(value)[:8]}")


def _dims(value: Any) -> list[int | str]:
    """Return the shape of a graph's input, output or value, with names where the size is free."""
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims]
