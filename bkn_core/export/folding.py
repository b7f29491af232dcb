"""Merge the affine map that follows a convolution or a linear layer into its weights, in float64."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class _Affine(NamedTuple):
    """y = scale · x + shift per channel, as the two nodes that compute it."""

    nodes: tuple[Any, Any]
    scale: Array
    shift: Array


def merge_affine(proto: Any) -> int:
    """Merge, in place, every Mul and Add of per-channel constants into the Conv or Gemm whose only reader it is.

        W' = a W,   b' = a b + c

    Returns:
        How many pairs were merged; those that follow something else stay.
    """
    from onnx import numpy_helper

    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}

    def array(name: str) -> Array:
        return numpy_helper.to_array(constants[name]).astype(np.float64)

    def following(node: Any, operation: str) -> tuple[Any, Array] | None:
        """Return the only reader of a node's result, if it is this operation with a constant."""
        name = node.output[0]
        found = readers.get(name, [])
        if name in outputs or len(found) != 1 or found[0].op_type != operation:
            return None
        other = [value for value in found[0].input if value != name]
        return (found[0], array(other[0])) if len(other) == 1 and other[0] in constants else None

    merged = Counter[str]()
    for node in list(graph.node):
        if node.op_type in ("Conv", "Gemm") and all(name in constants for name in node.input[1:]):
            affine = _affine_after(node, following)
            weight = array(node.input[1])
            axis = _output_axis(node)
            if affine is None or axis is None or not _per_channel(affine, weight.shape[axis], weight.ndim):
                continue
            bias = array(node.input[2]) if len(node.input) > 2 else np.zeros(weight.shape[axis])
            scale, shift = affine.scale.ravel(), affine.shift.ravel()
            shape = [1] * weight.ndim
            shape[axis] = -1
            values = {"weight": weight * scale.reshape(shape), "bias": bias * scale + shift}
            inputs = [node.input[0]]
            for key, value in values.items():
                inputs.append(f"{node.output[0]}.{key}")
                graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), inputs[-1]))
            node.input[:] = inputs
            node.output[0] = affine.nodes[1].output[0]
            for old in affine.nodes:
                graph.node.remove(old)
            merged[node.op_type] += 1
    return merged.total()
