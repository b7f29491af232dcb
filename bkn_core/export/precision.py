"""Half precision for the weights and convolutions of a graph; normalization by image statistics stays in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def to_half(proto: Any, keep: Sequence[str]) -> Any:
    """Return a graph in float16 whose input and output stay float32.

    Args:
        proto: an `onnx.ModelProto`, used up.
        keep: names of the nodes that stay in float32: sums of squares leave the range of float16.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    del proto.graph.value_info[:]  # with constants among them, which the converter would take for float16
    half = convert_float_to_float16(proto, keep_io_types=True, node_block_list=list(keep))
    _join(half.graph)
    _sort(half.graph)
    return half


def _join(graph: Any) -> None:
    """Let float32 nodes read each other directly, in place: the converter casts to float16 and back between any two."""
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    direct = {}
    for name, cast in casts.items():
        narrowed = casts.get(cast.input[0])
        if name.endswith("_cast_to_fp32") and narrowed is not None and narrowed.input[0].endswith("_cast_to_fp16"):
            direct[name] = narrowed.input[0]
    for node in graph.node:
        node.input[:] = [direct.get(name, name) for name in node.input]
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    # One value that several float32 nodes read is cast once for each, under one name.
    kept = [node for node in graph.node if node.op_type != "Cast"]
    kept += [cast for name, cast in casts.items() if name in read and name not in direct]
    read = {name for node in kept for name in node.input} | {value.name for value in graph.output}
    kept = [node for node in kept if node.op_type != "Cast" or node.output[0] in read]
    del graph.node[:]
    graph.node.extend(kept)


def _sort(graph: Any) -> None:
    """Put every node, in place, behind those that it reads: the converter appends its casts."""
    waiting = list(graph.node)
    made = {value.name for value in (*graph.input, *graph.initializer)} | {""}
    del graph.node[:]
    while waiting:
        ready = [node for node in waiting if made.issuperset(node.input)]
        assert ready
        for node in ready:
            made.update(node.output)
        graph.node.extend(ready)
        waiting = [node for node in waiting if not made.issuperset(node.output)]
