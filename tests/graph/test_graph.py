"""The straight program and its interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bkn_core.filter.kalman import Gaussian
from bkn_core.graph.graph import Graph, Node
from bkn_core.graph.operations import Interpreter, describe, evaluate
from bkn_core.graph.rules.pointwise import CLOSED_FORMS, ELEMENTWISE
from bkn_core.graph.values import name_of


def chain(length: int) -> Graph:
    nodes = [Node("norm", (), 2, name="bn", words="bn")]
    nodes += [Node("add", (i, 0), 2) for i in range(length)]
    return Graph(tuple(nodes), {"last": length}, {})


def ones(_: str) -> Gaussian:
    return Gaussian(torch.ones(2), torch.ones(2))


def test_programs_deeper_than_the_stack_are_evaluated() -> None:
    result = Interpreter(chain(5000), nn.Module(), ones).node(5000)
    assert result.mean.tolist() == [5001.0, 5001.0]


def test_every_line_is_computed_once_and_only_when_needed() -> None:
    asked: list[str] = []

    def leaf(name: str) -> Gaussian:
        asked.append(name)
        return ones(name)

    nodes = (
        Node("norm", name="a"),
        Node("norm", name="b"),
        Node("add", (0, 0)),
        Node("multiply", (2, 0)),
        Node("add", (2, 3)),
    )
    Interpreter(Graph(nodes, {"x": 4}, {}), nn.Module(), leaf).node(4)
    assert asked == ["a"]


def test_only_keeps_what_is_needed_and_renumbers() -> None:
    nodes = (
        Node("norm", name="a", words="a"),
        Node("norm", name="b", words="b"),
        Node("elementwise", (1,), options=("relu", (), ()), words="relu"),
        Node("convolution", (2,), name="c.weight", options=("", 1), words="c"),
    )
    graph = Graph(nodes, {"x": 3, "y": 0}, {}).only({"x": 3}, {"y": "dropped"})
    assert [node.operation for node in graph.nodes] == ["norm", "elementwise", "convolution"]
    assert describe(graph, graph.priors["x"]) == "relu(b) -> c"
    assert graph.reasons == {"y": "dropped"}


def test_long_words_are_cut_in_the_middle() -> None:
    nodes = [Node("norm", name="a", words="a")]
    nodes += [Node("elementwise", (i,), words="activation") for i in range(100)]
    words = describe(Graph(tuple(nodes), {}, {}), 100)
    assert len(words) < 200 and words.startswith("activation(") and " ... " in words


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.Tensor.__iadd__, "add"),
        (torch.Tensor.add_, "add"),
        (torch.add, "add"),
        (torch.nn.functional.relu_, "relu"),
        (torch.Tensor.__getitem__, "getitem"),
        (torch.Tensor.__setitem__, "setitem"),
        (torch.Tensor.__rsub__, "reversed_sub"),
        (torch.max_pool2d, "max_pool2d"),
        (torch.nn.functional.max_pool2d_with_indices, "max_pool2d"),
        (torch.Tensor.T.__get__, "T"),
        (torch.Tensor.itruediv if hasattr(torch.Tensor, "itruediv") else torch.Tensor.__itruediv__, "truediv"),
    ],
)
def test_names_of_functions(function: object, name: str) -> None:
    assert name_of(function) == name  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_every_elementwise_function_has_moments(name: str) -> None:
    options = {
        "clamp": (0.1, 1.0),
        "clip": (0.1, 1.0),
        "clamp_min": (0.1,),
        "clamp_max": (1.0,),
        "threshold": (0.1, 0.0),
        "pow": (3,),
    }
    node = Node("elementwise", (0,), 2, options=(name, options.get(name, ()), ()))
    result = evaluate(node, [Gaussian(torch.full((2,), 4.0), torch.full((2,), 0.01))], nn.Module())
    assert result.mean.isfinite().all() and (result.variance >= 0).all()


def test_closed_forms_are_among_the_known_functions() -> None:
    assert set(CLOSED_FORMS) <= ELEMENTWISE
