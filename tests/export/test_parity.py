"""The gate of an export: what passes and what does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from bkn_core.errors import CheckFailedError
from bkn_core.export.parity import check_parity

WEIGHT = np.eye(3, dtype=np.float32)
EXAMPLE = torch.zeros(2, 3)


def graph(weight: np.ndarray = WEIGHT, operator: str = "MatMul") -> Any:
    made = helper.make_graph(
        [helper.make_node(operator, ["input", "w"], ["logits"])],
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def identity(images: Tensor) -> Tensor:
    return images


def test_batches_of_one_two_and_seven_and_all_images_are_compared() -> None:
    sizes: list[int] = []

    def counted(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return images

    found = check_parity(graph(), counted, EXAMPLE, torch.rand(50, 3), tolerance=1e-4)
    assert sizes == [1, 2, 7, 1, 2, 7, 32, 8]
    assert (found.images, found.top1_agreement, found.max_abs) == (60, 1.0, 0.0)
    assert found.provider == "CPUExecutionProvider"


def test_fewer_images_than_ten_are_all_compared() -> None:
    assert check_parity(graph(), identity, EXAMPLE, torch.rand(5, 3), tolerance=1e-4).images == 15


def test_a_difference_within_the_tolerance_passes_and_is_reported() -> None:
    images = torch.full((1, 3), 100.0)
    found = check_parity(graph(WEIGHT * np.float32(1.00005)), identity, EXAMPLE, images, tolerance=1e-4)
    assert found.max_abs == pytest.approx(0.005, rel=0.01)


def test_a_difference_outside_the_tolerance_fails() -> None:
    with pytest.raises(CheckFailedError, match="differ by"):
        check_parity(graph(WEIGHT * np.float32(1.01)), identity, EXAMPLE, None, tolerance=1e-4)


class Scaled(nn.Module):
    """Two layers, of which the second is not what it should be where `factor` is not 1."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.second.weight).data.mul_(factor)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x))
        return result


@pytest.mark.parametrize(
    ("prepared", "words"),
    [(1.5, r"the first layer to differ is second \(Linear\) by "), (1.0, "no layer differs before ONNX Runtime")],
)
def test_a_difference_is_explained(prepared: float, words: str) -> None:
    images = torch.zeros(5, 3)
    images[4] = 100
    made = graph(WEIGHT * np.float32(1.00012))  # which noise does not show
    with pytest.raises(CheckFailedError, match="first in image 1 of a batch of 2, images 3 to 4"):
        check_parity(made, identity, images[:2], images, tolerance=1e-4)
    with pytest.raises(CheckFailedError, match=f"0 from its result in float64; {words}") as told:
        check_parity(made, Scaled(1.0), images[:2], images, tolerance=1e-4, prepared=Scaled(prepared))
    assert told.value.message.endswith("no file was written")


def test_a_tie_within_the_tolerance_is_no_disagreement() -> None:
    weight = WEIGHT + np.float32(1e-5) * np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)
    tied = torch.tensor([[1.0, 1.0, 0.0]])  # the graph prefers the second by 1e-5
    assert check_parity(graph(weight), identity, EXAMPLE, tied, tolerance=1e-4).top1_agreement == 1


def test_logits_that_are_not_finite_fail() -> None:
    with pytest.raises(CheckFailedError, match="the model gives logits that are not finite"):
        check_parity(graph(), lambda images: images / 0, EXAMPLE, None, tolerance=1e-4)
    with pytest.raises(CheckFailedError, match="differ by nan"):
        check_parity(graph(WEIGHT * np.float32("nan")), identity, EXAMPLE, None, tolerance=1e-4)


def test_logits_of_another_shape_fail() -> None:
    with pytest.raises(CheckFailedError, match="logits of shape"):
        check_parity(graph(), lambda images: images[:, :2], EXAMPLE, None, tolerance=1e-4)


def test_a_graph_that_the_checker_refuses_fails() -> None:
    with pytest.raises(CheckFailedError, match="the ONNX checker refuses"):
        check_parity(graph(operator="NoSuchOperator"), identity, EXAMPLE, None, tolerance=1e-4)
