"""Merge the affine map that follows a convolution or a linear layer into its weights, in float64."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def merge_affine(proto: Any) -> int:
    """Merge, in place, every Mul and Add of per-channel constants into the Conv or Gemm that alone they follow.

        W' = a W,   b' = a b + c

    Args:
        proto: an `onnx.ModelProto`.

    Returns:
        How many pairs were merged; those that follow something else stay.
    """
    graph = _Graph(proto.graph)
    merged = 0
    for node in list(proto.graph.node):
        if not _is_plain(node) or not all(name in graph.constants for name in node.input[1:]):
            continue
        axis, weight = _output_axis(node), graph.constant(node.input[1])
        channels = weight.shape[axis]
        shape = (channels, *([1] * (weight.ndim - 2)))
        multiply, scale = graph.applied_to(node, "Mul", shape)
        add, shift = graph.applied_to(multiply, "Add", shape)
        if add is None:
            continue
        bias = graph.constant(node.input[2]) if len(node.input) > 2 else np.zeros(channels)
        columns = [1] * weight.ndim
        columns[axis] = channels
        graph.set_weights(node, weight * scale.reshape(columns), bias * scale + shift)
        node.output[0] = add.output[0]
        proto.graph.node.remove(multiply)
        proto.graph.node.remove(add)
        merged += 1
    return merged


class _Graph:
    """Who reads what in an ONNX graph."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.outputs = {value.name for value in graph.output}

    def constant(self, name: str) -> Array:
        """Return an initializer in float64."""
        from onnx import numpy_helper

        values: Array = numpy_helper.to_array(self.constants[name]).astype(np.float64)
        return values

    def applied_to(self, node: Any, operation: str, shape: tuple[int, ...]) -> tuple[Any, Array]:
        """Return the only reader of a node and its constant (C,), or None where it is no such operation."""
        nothing = None, np.zeros(0)
        if node is None or node.output[0] in self.outputs:
            return nothing
        readers = self.readers[node.output[0]]
        if len(readers) != 1 or readers[0].op_type != operation:
            return nothing
        others = [name for name in readers[0].input if name != node.output[0]]
        if len(others) != 1 or others[0] not in self.constants:
            return nothing
        values = self.constant(others[0])
        if values.size != shape[0] or values.shape[-len(shape) :] != shape:
            return nothing
        return readers[0], values.ravel()

    def set_weights(self, node: Any, weight: Array, bias: Array) -> None:
        """Give a node weights of its own; the old ones may serve other nodes."""
        from onnx import numpy_helper

        inputs = [node.input[0]]
        for key, values in (("weight", weight), ("bias", bias)):
            inputs.append(f"{node.output[0]}.{key}")
            self.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), inputs[-1]))
        node.input[:] = inputs


def _is_plain(node: Any) -> bool:
    """Whether a node is a convolution, or a Gemm without factors of its own."""
    scaled = any(a.name in ("alpha", "beta") and a.f != 1 for a in node.attribute)
    return node.op_type == "Conv" or (node.op_type == "Gemm" and not scaled)


def _output_axis(node: Any) -> int:
    """Return the axis of the weights that counts the outputs: a Gemm may hold them transposed."""
    return 0 if node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute) else 1
