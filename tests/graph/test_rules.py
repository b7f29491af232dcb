"""Every rule: what the kernels make of a node, and of its gradients, is what its evaluation makes in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bkn_core.filter.kalman import Gaussian
from bkn_core.graph.graph import Graph, Node
from bkn_core.graph.input_moments import reserve_input_moments
from bkn_core.graph.kernel_program import KernelProgram
from bkn_core.graph.operations import FUNCTIONS, RULES, Interpreter, describe
from bkn_core.graph.rules import curves
from bkn_core.graph.triton_program import TritonProgram
from bkn_core.ops import backend, kernels
from bkn_core.ops.cuda import layout
from bkn_core.priors.named_layers import norm_of, normalized_message

GATE, RECTIFIED = ("mul", ("x", ("sigmoid", ("x",), ())), ()), ("relu", ("x",), ())
ARGUMENTS = {"clamp": (-0.3, 1.1), "clip": (-0.3, 1.1), "clamp_min": (0.1,), "clamp_max": (0.6,)}

# Of each operation, nodes that read the layers 0 and 1, of six channels.
NODES: dict[str, list[Node]] = {
    "norm": [Node("norm", (), 6, name="first", words="first")],
    "given": [Node("given", (), 6, name=2)],
    "measured": [Node("measured", (), 6, name="second", words="input")],
    "patches": [Node("patches", (), 5, name="stem.weight", options=("stem.bias", "stem"), words="input -> stem")],
    "convolution": [Node("convolution", (0,), 4, name="conv.weight", options=("conv.bias", 2), words="conv")],
    "transposed_convolution": [
        Node("transposed_convolution", (0,), 4, name="up.weight", options=("up.bias", 2, (2, 1), (1, 1)), words="up")
    ],
    "elementwise": [
        Node("elementwise", (0,), 6, options=(name, ARGUMENTS.get(name, ()), ()), words=name)
        for name in curves.FUNCTIONS
    ],
    "fused": [Node("fused", (0,), 6, options=(GATE,), words="mul")],
    "prelu": [Node("prelu", (0,), 6, name=name, words="prelu") for name in ("each", "one")],
    "max_pool": [Node("max_pool", (0,), 6, options=(4.0, expression)) for expression in ("x", RECTIFIED, GATE)],
    "average": [Node("average", (0,), 6, options=(9.0,))],
    "pass": [Node("pass", (0,), 6)],
    "gather": [Node("gather", (0,), 3, options=((5, 0, 2),))],
    "affine": [Node("affine", (0,), 6, options=(0.5, -0.2))],
    "scale": [Node("scale", (0,), 6, name=name, words=name) for name in ("each", "one")],
    "shift": [Node("shift", (0,), 6, name=name) for name in ("each", "one")],
    "add": [Node("add", (0, 1), 6)],
    "multiply": [Node("multiply", (0, 1), 6)],
    "concatenate": [Node("concatenate", (0, 1), 12)],
}


class Parts(nn.Module):
    """What the nodes read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.stem = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.Conv2d(3, 5, 2)
        self.conv, self.up = nn.Conv2d(6, 4, 3, groups=2), nn.ConvTranspose2d(6, 4, (3, 2), groups=2)
        self.each, self.one = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(1))
        for module in (self.stem, self.second):
            reserve_input_moments(module)
            factor = torch.randn(module.input_covariance.shape)
            module.input_covariance.copy_(factor @ factor.T)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))


def test_every_rule_with_a_kernel_has_a_node_here() -> None:
    assert NODES.keys() == {name for name, rule in RULES.items() if rule.lower is not None}


def test_no_function_is_traced_by_two_rules() -> None:
    assert sum(len(rule.trace) for rule in RULES.values()) == len(FUNCTIONS)


@pytest.fixture(params=[KernelProgram, TritonProgram])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[KernelProgram]:
    if request.param is KernelProgram and kernels.library() is None:
        pytest.skip("no C compiler")
    if request.param is TritonProgram:
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the interpreter is for machines without a GPU")
        monkeypatch.setattr(backend, "chosen", lambda: "triton")
        monkeypatch.setattr(layout, "CHANNELS", 4)  # so that there are tiles
    made: type[KernelProgram] = request.param
    return made


@pytest.mark.parametrize("node", [node for nodes in NODES.values() for node in nodes], ids=lambda node: node.operation)
def test_every_kernel_equals_its_evaluation(node: Node, kind: type[KernelProgram]) -> None:
    model = Parts()
    exact = copy.deepcopy(model).double()
    layers = (Node("norm", (), 6, name="first", words="first"), Node("norm", (), 6, name="second", words="second"))
    graph = Graph((*layers, node), {"result": 2}, {})
    given = Gaussian(torch.randn(6), torch.rand(6))
    found = kind(graph, (), model).predictions(model, {2: given})
    assert found is not None
    interpreter = Interpreter(graph, exact, lambda name: normalized_message(norm_of(exact, name)))
    if node.operation == "given":
        interpreter.results[2] = given
    assert_equal(found[0]["result"], interpreter.node(2))
    assert (node.words or "first") in describe(graph, 2) or node.operation == "given"
    if node.operation not in ("given", "measured"):
        assert_same_gradients(model, found[0]["result"], exact, interpreter.node(2))


def assert_equal(actual: Gaussian, expected: Gaussian) -> None:
    for values, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(values.double(), exact.double(), rtol=1e-5, atol=1e-6)


def assert_same_gradients(model: nn.Module, actual: Gaussian, exact: nn.Module, expected: Gaussian) -> None:
    """Of a sum with drawn weights, of every parameter that either reads."""
    weights = torch.randn(2, len(expected.mean), dtype=torch.float64)
    total(actual, weights.float()).backward()
    total(expected, weights).backward()
    for (name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        found, wanted = (torch.zeros_like(p) if p.grad is None else p.grad for p in (parameter, other))
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-5, msg=name)


def total(message: Gaussian, weights: Tensor) -> Tensor:
    return (weights * torch.stack(tuple(message))).sum()
