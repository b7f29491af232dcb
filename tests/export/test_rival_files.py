"""Files of other authors' normalizations: what a layer becomes, counted, and the logits of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, get_args

import onnx
import onnxruntime
import pytest
import torch
from drawn_models import Small, drawn_images, drawn_model
from torch import nn
from torch.nn.utils import parametrize

from bkn_core.convert import fold
from bkn_core.export.metadata import norm_kind
from bkn_core.export.onnx_file import ExportResult
from bkn_core.kinds import Rivals

Exporter = Callable[..., ExportResult]

# What Conv, Norm, Relu twice are in the file, beside the head. A clip and a ReLU are one clip.
FOLDS: dict[str, tuple[str | None, dict[str, int]]] = {
    "gn_ws": (None, {"Conv": 2, "Relu": 2}),
    "mabn": ("affine", {"Conv": 2, "Mul": 2, "Add": 2, "Relu": 2}),
    "frn": (None, {"Conv": 2, "Max": 2, "Relu": 0}),
    "evonorm": (None, {"Conv": 2, "Sigmoid": 2, "Relu": 0}),
    "gkn": (None, {"Conv": 2, "Relu": 2}),
    "frozen": ("affine", {"Conv": 2, "Mul": 2, "Add": 2, "Relu": 2}),
    "cbn": ("affine", {"Conv": 2, "Mul": 2, "Add": 2, "Relu": 2}),
    "reference": ("affine", {"Conv": 2, "Mul": 2, "Add": 2, "Relu": 2}),
    "normprop": ("affine", {"Conv": 2, "Mul": 4, "Add": 4, "Relu": 2}),
    "iternorm": ("matrix", {"Conv": 4, "Relu": 2}),
    "online": ("affine", {"Conv": 2, "Mul": 2, "Add": 2, "Clip": 2}),
}
MERGED = {
    "mabn": {"Conv": 2, "Relu": 2},
    "cbn": {"Conv": 2, "Relu": 2},
    "frozen": {"Conv": 2, "Relu": 2},
    "reference": {"Conv": 2, "Relu": 2},
    "normprop": {"Conv": 2, "Relu": 2, "Mul": 2, "Add": 2},
    "online": {"Conv": 2, "Clip": 2},
}
HEAD = {"ReduceMean": 1, "Gemm": 1}


class WithModules(Small):
    """The small network, its activations modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def trained(kind: str) -> nn.Module:
    """A model that has seen some batches and moved, in evaluation mode."""
    model = drawn_model(WithModules(), kind=kind).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(drawn_images()).square().mean().backward()
        optimizer.step()
    return model.eval()


QUICK = ("gn_ws", "online", "reference", "iternorm", "normprop")  # one of each way to fold


def some_slow(kinds: Iterable[str], quick: tuple[str, ...]) -> list[Any]:
    return [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.mark.parametrize("kind", some_slow(get_args(Rivals), QUICK))
def test_a_file_holds_what_the_layer_folds_to_and_gives_the_models_logits(export: Exporter, kind: str) -> None:
    model, images = trained(kind), drawn_images()
    result = export(model, images)
    folded, expected = FOLDS[kind]
    found = Counter(node.op_type for node in onnx.load(result.path).graph.node)
    assert result.fold == folded and norm_kind(model) == kind
    if folded is not None:
        assert found == expected | HEAD
    else:
        assert {name: found[name] for name in expected} == expected
    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    logits = torch.from_numpy(session.run(["logits"], {"input": images[:3].numpy()})[0])
    torch.testing.assert_close(logits, model(images[:3]).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", some_slow(MERGED, ("normprop",)))
def test_what_is_affine_merges_into_the_convolution(export: Exporter, kind: str) -> None:
    result = export(trained(kind), drawn_images(), fold="conv")
    assert Counter(node.op_type for node in onnx.load(result.path).graph.node) == MERGED[kind] | HEAD


@pytest.mark.parametrize("kind", ["gn_ws", "mabn", "normprop"])
def test_weights_are_baked_into_a_folded_model(kind: str) -> None:
    model: Any = trained(kind)
    folded: Any = fold(model)
    assert parametrize.is_parametrized(model.conv1) and not parametrize.is_parametrized(folded.conv1)
    assert torch.equal(folded.conv1.weight, model.conv1.weight)
    torch.testing.assert_close(folded(drawn_images()), model(drawn_images()), rtol=1e-5, atol=1e-5)
