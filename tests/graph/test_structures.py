"""Shapes of models that mislead a converter, and what discovery leaves behind."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from brute_force import Base, assert_right, draw_affine, images, predicted, sampled
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bkn_core.filter.kalman import Gaussian
from bkn_core.graph.operations import Interpreter, describe
from bkn_core.graph.trace import trace


class NormTwice(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.stem(x)))
        h = self.bn2(self.conv2(F.relu(self.bn2(self.conv1(h)))))
        return self.bn3(self.conv2(h))


class PreActivation(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h[:, :, 1:-1, 1:-1] + self.conv1(F.relu(self.bn1(h)))
        return self.bn2(h)


class Residual(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.stem(x)))
        h = F.relu(self.bn2(self.conv1(h)) + h[:, :, 1:-1, 1:-1])
        return self.bn3(self.conv2(h))


class Concatenated(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.stem(x))
        joined = torch.cat([F.relu(h[:, :4, 1:-1, 1:-1]), self.bn2(self.conv1(h))[:, 4:]], dim=1)
        return self.bn3(joined)


class Tied(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.stem(x))
        h = self.bn2(self.conv1(F.relu(h)))
        return self.bn3(self.conv1(F.relu(h)))


class DictOutput(Base):
    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.bn1(self.stem(x))
        auxiliary = self.bn2(self.conv1(F.relu(h)))
        return {"out": OrderedDict(deep=[self.bn3(self.conv2(F.silu(h)))]), "aux": auxiliary}


class WeightNorm(Base):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv1(F.relu(self.bn1(self.stem(x)))))


class Checkpointed(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda t: F.relu(self.bn1(self.stem(t))), x, use_reentrant=False)
        return self.bn2(self.conv1(h))


class FrozenStem(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = F.relu(self.bn1(self.stem(x)))
        return self.bn2(self.conv1(h))


class Head(Base):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn4 = nn.Linear(8, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.stem(x)))
        return self.bn4(self.linear(F.adaptive_avg_pool2d(h, 1).flatten(1)))


class Flattened(Base):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn4 = nn.Linear(8 * 64, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn4(self.linear(F.relu(self.bn1(self.stem(x))).flatten(1)))


class Tokens(Base):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn4 = nn.Linear(8, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = F.gelu(self.bn1(self.stem(x)).flatten(2).transpose(1, 2))
        return self.bn4(self.linear(tokens).transpose(1, 2))


class Functional(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.stem(x)))
        weight = self.conv1.weight / self.conv1.weight.norm()
        return self.bn2(F.conv2d(h, weight))


class Standardized(Base):
    def forward(self, x: Tensor) -> Tensor:
        w = self.conv1.weight
        variance, mean = torch.var_mean(w, dim=[1, 2, 3], keepdim=True, correction=0)
        w = (w - mean) * torch.rsqrt(variance + 1e-5) * self.bn3.weight.view(-1, 1, 1, 1)
        h = F.conv2d(F.relu(self.bn1(self.stem(x))), w, self.conv1.bias)
        rows = F.batch_norm(self.conv2.weight.reshape(1, 8, -1), None, None, training=True, momentum=0.0)
        return self.bn3(F.conv2d(F.relu(self.bn2(h)), rows.reshape_as(self.conv2.weight)))


class Depthwise(Base):
    def __init__(self) -> None:
        super().__init__()
        self.depth, self.grouped = nn.Conv2d(8, 16, 3, groups=8, bias=False), nn.Conv2d(16, 8, 3, groups=2, stride=2)
        self.prelu, self.bn4 = nn.PReLU(16), nn.BatchNorm2d(16)
        nn.init.uniform_(self.prelu.weight)
        draw_affine(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.grouped(self.prelu(self.bn4(self.depth(F.relu(self.bn1(self.stem(x))))))))


class PReLU(Base):
    def __init__(self) -> None:
        super().__init__()
        self.prelu = nn.PReLU(8)
        nn.init.uniform_(self.prelu.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv1(self.prelu(self.bn1(self.stem(x)))))


class SqueezeExcite(Base):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.stem(x)))
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(h, 1)))))
        return self.bn2(self.conv1(h * gate))


class Unaffine(Base):
    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv1(F.relu(self.bn1(self.stem(x)))))


class Unbiased(Base):
    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(8, bias=False)
        nn.init.uniform_(self.bn1.weight, 2.0, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv1(F.relu(self.bn1(self.stem(x)))))


EXAMPLE = images(3)
RIGHT: dict[type[Base], set[str]] = {
    PreActivation: set(),
    Residual: {"bn2", "bn3"},
    Concatenated: {"bn2", "bn3"},
    Tied: {"bn2", "bn3"},
    DictOutput: {"bn2", "bn3"},
    WeightNorm: {"bn2"},
    Functional: {"bn2"},
    Standardized: {"bn2", "bn3"},
    Checkpointed: {"bn2"},
    FrozenStem: {"bn2"},
    Flattened: {"bn4"},
    Tokens: {"bn4"},
    PReLU: {"bn2"},
    Depthwise: {"bn2", "bn4"},
    Unaffine: {"bn2"},
    Unbiased: {"bn2"},
}

# One value per image leaves few samples; a sum of a Gaussian and a rectified one is no Gaussian any more.
TOLERANCES = {Flattened: {"mean": 0.08, "variance": 0.15}, Residual: {"mean": 0.05, "variance": 0.12}}


@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_priors_are_right(kind: type[Base]) -> None:
    model = kind()
    priors, truth = predicted(model, EXAMPLE), sampled(model, images(1500))
    assert set(priors) >= RIGHT[kind]
    for name in RIGHT[kind]:
        assert_right(priors[name], truth[name], **TOLERANCES.get(kind, {}))


def test_norm_that_is_called_twice_has_no_prior_but_predicts() -> None:
    model = NormTwice()
    graph = trace(model, EXAMPLE)
    assert "more than once" in graph.reasons["bn2"]
    assert describe(graph, graph.priors["bn3"]) == "bn2 -> conv2"
    assert_right(predicted(model, EXAMPLE)["bn3"], sampled(model, images())["bn3"])


def test_sum_of_features_and_their_own_convolution_mixes_the_input() -> None:
    graph = trace(PreActivation(), EXAMPLE)
    assert describe(graph, graph.priors["bn2"]) == "input -> stem + relu(bn1) -> conv1"


def test_average_pooling_keeps_the_mean() -> None:
    model = Head()
    prior, truth = predicted(model, EXAMPLE)["bn4"], sampled(model, images(1500))["bn4"]
    torch.testing.assert_close(prior.mean, truth.mean, rtol=0.02, atol=0.02)


def test_excitation_reads_the_words_of_its_branches() -> None:
    graph = trace(SqueezeExcite(), EXAMPLE)
    words = describe(graph, graph.priors["bn2"])
    assert words == "relu(bn1) * sigmoid(relu(relu(bn1) -> down) -> up) -> conv1"


def test_priors_follow_the_parameters_that_weights_are_computed_from() -> None:
    model = Standardized()
    graph = trace(model, EXAMPLE)
    leaf = Gaussian(torch.zeros(8), torch.ones(8))
    interpreter = Interpreter(graph, model, lambda _: leaf)
    interpreter.node(graph.priors["bn2"]).variance.sum().backward()
    assert model.bn3.weight.grad is not None and model.bn3.weight.grad.abs().min() > 0
    with torch.no_grad():
        before = Interpreter(graph, model, lambda _: leaf).node(graph.priors["bn2"]).variance
        model.bn3.weight.mul_(2)
        after = Interpreter(graph, model, lambda _: leaf).node(graph.priors["bn2"]).variance
    torch.testing.assert_close(after, 4 * before)
    assert pickle.loads(pickle.dumps(graph)) == graph and hash(graph.nodes)


def test_norm_of_the_input_is_measured() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    graph = trace(model, EXAMPLE)
    assert describe(graph, graph.priors["0"]) == "input"
    assert_right(predicted(model, EXAMPLE)["2"], sampled(model, images())["2"])


def test_layer_that_the_example_does_not_reach_is_named() -> None:
    model = Tied()
    model.spare = nn.BatchNorm2d(4)
    assert "not reached" in trace(model, EXAMPLE).reasons["spare"]


def test_every_layer_has_a_prior_or_a_reason() -> None:
    for kind in [*RIGHT, NormTwice, SqueezeExcite, Head]:
        model = kind()
        graph = trace(model, EXAMPLE)
        names = {name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
        assert set(graph.priors) | set(graph.reasons) == names
        assert not set(graph.priors) & set(graph.reasons)
