"""Merging affine maps into weights, on graphs written by hand, with ONNX Runtime as the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from bkn_core.export.folding import merge_affine

RANDOM = np.random.default_rng(0)


def drawn(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def model(nodes: list[Any], constants: dict[str, np.ndarray], shape: list[int], outputs: tuple[str, ...]) -> Any:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(shape)) for name in outputs],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def results(proto: Any, x: np.ndarray) -> list[np.ndarray]:
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def merged(proto: Any, x: np.ndarray) -> int:
    """Merge, and check that the results stay."""
    before = results(proto, x)
    count = merge_affine(proto)
    for old, new in zip(before, results(proto, x), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-4)
    return count


def affine(constant_first: bool = False) -> list[Any]:
    first, second = (["a", "c"], ["s", "y1"]) if constant_first else (["c", "a"], ["y1", "s"])
    return [helper.make_node("Mul", first, ["y1"]), helper.make_node("Add", second, ["y"])]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("constant_first", [False, True])
def test_convolutions_take_the_affine_map_that_follows(bias: bool, groups: int, constant_first: bool) -> None:
    constants = {"w": drawn(6, 4 // groups, 3, 3), "a": drawn(1, 6, 1, 1), "s": drawn(6, 1, 1)}
    constants |= {"b": drawn(6)} if bias else {}
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    nodes = [helper.make_node("Conv", inputs, ["c"], group=groups), *affine(constant_first)]
    proto = model(nodes, constants, [2, 4, 5, 5], ("y",))
    assert merged(proto, drawn(2, 4, 5, 5)) == 1
    assert [node.op_type for node in proto.graph.node] == ["Conv"]


@pytest.mark.parametrize("transposed", [0, 1])
def test_linear_layers_take_the_affine_map_that_follows(transposed: int) -> None:
    weight = drawn(6, 4) if transposed else drawn(4, 6)
    proto = model(
        [helper.make_node("Gemm", ["x", "w", "b"], ["c"], transB=transposed), *affine()],
        {"w": weight, "b": drawn(6), "a": drawn(1, 6), "s": drawn(1, 6)},
        [2, 4],
        ("y",),
    )
    assert merged(proto, drawn(2, 4)) == 1
    assert [node.op_type for node in proto.graph.node] == ["Gemm"]


def test_weights_that_two_convolutions_share_are_scaled_for_one_only() -> None:
    constants = {"w": drawn(6, 4, 1, 1), "a": drawn(1, 6, 1, 1), "s": drawn(1, 6, 1, 1)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Conv", ["x", "w"], ["z"]), *affine()]
    assert merged(model(nodes, constants, [2, 4, 3, 3], ("y", "z")), drawn(2, 4, 3, 3)) == 1


@pytest.mark.parametrize("name", ["c", "y1"])
def test_values_that_others_read_stay(name: str) -> None:
    constants = {"w": drawn(6, 4, 1, 1), "a": drawn(1, 6, 1, 1), "s": drawn(1, 6, 1, 1)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), *affine()]
    x = drawn(2, 4, 3, 3)
    assert merged(model(nodes, constants, [2, 4, 3, 3], ("y", name)), x) == 0
    reader = helper.make_node("Relu", [name], ["z"])
    assert merged(model([*nodes, reader], constants, [2, 4, 3, 3], ("y", "z")), x) == 0


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 6), (1, 6, 6, 6)])
def test_constants_that_are_not_one_number_per_channel_stay(shape: tuple[int, ...]) -> None:
    constants = {"w": drawn(6, 4, 1, 1), "a": drawn(*shape).reshape(shape), "s": drawn(1, 6, 1, 1)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), *affine()]
    assert merged(model(nodes, constants, [2, 4, 6, 6], ("y",)), drawn(2, 4, 6, 6)) == 0


def test_scaled_linear_layers_stay() -> None:
    constants = {"w": drawn(6, 4), "b": drawn(6), "a": drawn(1, 6), "s": drawn(1, 6)}
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["c"], transB=1, beta=0.5), *affine()]
    assert merged(model(nodes, constants, [2, 4], ("y",)), drawn(2, 4)) == 0
