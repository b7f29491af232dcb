"""Every node that the CPU kernels or PyTorch evaluate, alone: priors and gradients against float64."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_kernel_program import IMAGES, assert_equal_to_float64, drawn, predictions
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bkn_core.filter.kalman import Gaussian
from bkn_core.graph.graph import Node
from bkn_core.graph.operations import RULES
from bkn_core.graph.rules.curves import FUNCTIONS
from bkn_core.graph.rules.pointwise import ELEMENTWISE
from bkn_core.ops import kernels

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
OPTIONS: dict[str, dict[str, Any]] = {
    "hardtanh": {"min_val": -0.5, "max_val": 0.7},
    "clamp": {"min": -0.3, "max": 1.1},
    "clip": {"max": 0.4},
    "clamp_min": {"min": 0.1},
    "clamp_max": {"max": 0.6},
    "threshold": {"threshold": 0.2, "value": -0.1},
    "leaky_relu": {"negative_slope": 0.2},
}
POSITIVE = {"sqrt", "log1p", "pow"}  # not numbers elsewhere


class Between(nn.Module):
    """A function of features between two norm layers."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: int = 6, **modules: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels)
        self.parts = nn.ModuleDict(modules)
        self.function = function
        with torch.no_grad():
            width = self.applied(torch.zeros(2, channels, 8, 8)).shape[1]
        self.head, self.norm2 = nn.Conv2d(width, 4, 1), nn.BatchNorm2d(4)

    def applied(self, x: Tensor) -> Tensor:
        return self.function(x, **self.parts)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, apply, convolve."""
        return self.norm2(self.head(self.applied(self.norm1(self.stem(x)))))


def function_of(name: str) -> Callable[[Tensor], Tensor]:
    found = getattr(F, name, None) or getattr(torch, name)
    arguments, options = (1.5,) if name == "pow" else (), OPTIONS.get(name, {})
    return lambda x: found(F.softplus(x) if name in POSITIVE else x, *arguments, **options)


@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_every_elementwise_function(name: str) -> None:
    assert_right(Between(function_of(name)), is_whole=name in FUNCTIONS or name == "rrelu")  # taken for leaky


def assert_right(model: nn.Module, *, is_whole: bool = True) -> None:
    model = drawn(model)
    assert "norm2" in predictions(model)[0][0]
    assert_equal_to_float64(model, is_whole=is_whole)


def sharp(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gate(x: Tensor, squeeze: nn.Module, excite: nn.Module) -> Tensor:
    return x * F.hardsigmoid(excite(F.silu(squeeze(x.mean((2, 3), keepdim=True)))))


LINES: dict[str, Callable[[], nn.Module]] = {
    "tanh of gelu": lambda: Between(sharp),
    "spelled out swish": lambda: Between(lambda x: x * torch.sigmoid(x)),
    "spelled out hard swish": lambda: Between(lambda x: x * F.relu6(x + 3) / 6),
    "difference": lambda: Between(lambda x: F.silu(x) - 0.5 * x),
    "function of a function": lambda: Between(lambda x: torch.tanh(F.leaky_relu(F.silu(x) - 0.1))),
    "gate": lambda: Between(gate, squeeze=nn.Conv2d(6, 3, 1), excite=nn.Conv2d(3, 6, 1)),
    "gate of one channel": lambda: Between(lambda x, one: x * torch.sigmoid(one(x)), one=nn.Conv2d(6, 1, 1)),
    "prelu": lambda: Between(lambda x, act: act(x), act=nn.PReLU(6)),
    "prelu of one slope": lambda: Between(lambda x, act: act(act(x)[:, :4]), act=nn.PReLU()),
    "largest of silu": lambda: Between(lambda x: F.max_pool2d(F.silu(x), 2)),
    "largest of leaky": lambda: Between(lambda x: F.max_pool2d(F.leaky_relu(x, 0.1), 2)),
    "resized": lambda: Between(lambda x: F.interpolate(F.elu(x), scale_factor=2.0)),
}
TRANSPOSED: dict[str, dict[str, Any]] = {
    "two by two": {"kernel_size": 2, "stride": 2},
    "overlapping": {"kernel_size": 3, "stride": 2, "bias": False},
    "grouped": {"kernel_size": (3, 2), "stride": (2, 1), "groups": 3},
    "with holes": {"kernel_size": 3, "stride": (3, 2), "dilation": 2, "groups": 2},
    "gaps": {"kernel_size": 1, "stride": 2},
}


@pytest.mark.parametrize("name", LINES)
def test_lines(name: str) -> None:
    assert_right(LINES[name]())


@pytest.mark.parametrize("name", TRANSPOSED)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_transposed_convolutions(name: str, memory_format: torch.memory_format) -> None:
    up = nn.ConvTranspose2d(6, 12, **TRANSPOSED[name])
    model = drawn(Between(lambda x, up: F.relu(up(F.relu(x))), up=up))
    assert_equal_to_float64(model.to(memory_format=memory_format))  # type: ignore[call-overload]


class Scaled(nn.Module):
    """Learned numbers for each channel and for all, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.one = nn.Parameter(torch.ones(6, 1, 1)), nn.Parameter(torch.ones(1))
        self.vector = nn.Parameter(torch.ones(6))
        self.register_buffer("shift", torch.randn(1, 6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        return F.relu(x * self.each + self.one) * self.one * self.vector.view(1, -1, 1, 1) + self.shift


def test_scales_and_shifts() -> None:
    assert_right(Between(lambda x, scaled: scaled(x), scaled=Scaled()))


def test_volumes_in_channels_last() -> None:
    layers = [nn.ConvTranspose3d(4, 6, 2, 2), nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 5, 3), nn.BatchNorm3d(5)]
    stem = [nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2)]
    images = torch.randn(2, 3, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    model = drawn(nn.Sequential(*stem, *layers), images)
    assert_equal_to_float64(model.to(memory_format=torch.channels_last_3d))  # type: ignore[call-overload]


class Mixed(nn.Module):
    """Nodes that PyTorch evaluates, some of which read each other, among those of the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.middle, self.norm2 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.group, self.last, self.norm3 = nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        """Four levels of them."""
        x = F.softplus(self.norm1(self.stem(x)))
        y = self.group(self.group(F.relu(self.norm2(self.middle(x))) + x))
        return self.norm3(self.last(F.silu(y) + F.softsign(y * torch.sigmoid(x)) + x))


def test_lines_that_the_kernels_do_not_know_enter_as_they_are() -> None:
    model = drawn(Mixed())
    assert_equal_to_float64(model, is_whole=False)
    for name in ("group.weight", "norm1.bias", "middle.weight"):
        model.get_parameter(name).requires_grad_(False)
    assert_equal_to_float64(model, is_whole=False)


def test_only_the_lines_that_the_kernels_do_not_know_are_evaluated_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = drawn(Mixed())
    seen: list[str] = []
    for operation, rule in RULES.items():

        def counted(node: Node, *rest: Any, evaluate: Any = rule.evaluate) -> Gaussian:
            seen.append(node.words)
            result: Gaussian = evaluate(node, *rest)
            return result

        monkeypatch.setitem(RULES, operation, dataclasses.replace(rule, evaluate=counted))
    predictions(model)
    assert sorted(seen) == [
        "group_norm",
        "group_norm",
        "sigmoid",
        "softplus",
        "softsign",
    ]  # the sigmoid is one of softplus


def test_weights_made_by_a_parametrization_get_their_gradients_through_given_lines() -> None:
    model = Mixed()
    nn.utils.parametrizations.weight_norm(model.middle)
    nn.utils.parametrizations.weight_norm(model.last)
    assert_equal_to_float64(drawn(model), is_whole=False)


def test_a_weight_that_lies_otherwise_in_memory_is_copied() -> None:
    model = Between(lambda x, up: F.relu(up(x)), up=nn.Conv2d(6, 6, 3))
    weight = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(5)).permute(3, 2, 0, 1)
    model.parts["up"].weight = nn.Parameter(weight.flip(0).permute(1, 0, 3, 2))
    assert_right(model)


def test_copies_carry_all_programs() -> None:
    model = drawn(Mixed())
    predictions(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        assert_equal_to_float64(other, is_whole=False)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_two_forwards_and_checkpoints_give_the_gradients_of_pytorch_alone(
    monkeypatch: pytest.MonkeyPatch, reentrant: bool | None
) -> None:
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        outputs = [
            model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
            for x in (IMAGES.clone().requires_grad_(), IMAGES.flip(0).requires_grad_())
        ]
        sum((y.square() * torch.linspace(0, 1, y.numel()).view_as(y)).sum() for y in outputs).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model = drawn(Mixed())
    other, found = copy.deepcopy(model), gradients(model)
    monkeypatch.setattr(kernels, "are_usable", lambda: False)
    expected = gradients(other)
    assert found.keys() == expected.keys()
    rounding = 1e-6 * max(float(gradient.abs().max()) for gradient in expected.values())  # of a bias before a norm
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=rounding)


def test_a_distributed_wrapper_sees_every_gradient(process_group: None) -> None:
    model = drawn(Mixed())
    other = copy.deepcopy(model)
    for network in (model, nn.parallel.DistributedDataParallel(other)):
        network(IMAGES).square().mean().backward()
    for (name, parameter), same in zip(model.named_parameters(), other.parameters(), strict=True):
        assert parameter.grad is not None and same.grad is not None, name
        torch.testing.assert_close(same.grad, parameter.grad)
