"""Small models that mislead a converter: each prior is right by brute force, or there is none and a reason."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from brute_force import Between, Trap, assert_right, images, predicted, sampled
from torch import Tensor, nn
from torch.nn import functional as F

from bkn_core.graph.operations import describe
from bkn_core.graph.trace import trace

EXAMPLE = images(3)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def shuffled(h: Tensor) -> Tensor:
    n, c, height, width = h.shape
    return h.view(n, 2, c // 2, height, width).transpose(1, 2).reshape(n, c, height, width)


def in_place_add(trap: Trap, h: Tensor) -> Tensor:
    y = trap.side(h)
    y += h
    F.relu_(y)
    return y


def through_relu(h: Tensor) -> Tensor:
    return torch.relu(h) if h.mean() > -1e9 else h


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


# name: what stands between the two layers, and what the report calls it
PREDICTED: dict[str, tuple[Between, str]] = {
    "nothing": (lambda t, h: h, "bn1 -> conv"),
    "relu": (lambda t, h: F.relu(h), "relu(bn1) -> conv"),
    "relu in place": (lambda t, h: F.relu(h, inplace=True), "relu(bn1) -> conv"),
    "relu method in place": (lambda t, h: h.relu_(), "relu(bn1) -> conv"),
    "result of an in-place call discarded": (in_place_add, "relu(bn_other + bn1) -> conv"),
    "module in place": (lambda t, h: nn.ReLU(inplace=True)(h), "relu(bn1) -> conv"),
    "relu6": (lambda t, h: nn.ReLU6()(h), ""),
    "leaky": (lambda t, h: nn.LeakyReLU(0.3, inplace=True)(h), "leaky_relu(bn1) -> conv"),
    "hardtanh": (lambda t, h: nn.Hardtanh(-0.5, 1.5)(h), "hardtanh(bn1) -> conv"),
    "elu": (lambda t, h: nn.ELU(0.7, inplace=True)(h), "elu(bn1) -> conv"),
    "silu": (lambda t, h: F.silu(h), "silu(bn1) -> conv"),
    "gelu": (lambda t, h: nn.GELU(approximate="tanh")(h), "gelu(bn1) -> conv"),
    "mish": (lambda t, h: nn.Mish()(h), "mish(bn1) -> conv"),
    "softplus": (lambda t, h: nn.Softplus(2.0)(h), "softplus(bn1) -> conv"),
    "hardswish": (lambda t, h: nn.Hardswish()(h), "hardswish(bn1) -> conv"),
    "clamp": (lambda t, h: h.clamp(-0.5, 1.5), "clamp(bn1) -> conv"),
    "clamp from below": (lambda t, h: torch.clamp(h, min=0.2), "clamp(bn1) -> conv"),
    "number plus tensor": (lambda t, h: 1 + h, "bn1 -> conv"),
    "number times tensor": (lambda t, h: 2 * h, "bn1 -> conv"),
    "number minus tensor": (lambda t, h: 3 - h, "bn1 -> conv"),
    "tensor by number": (lambda t, h: (h - 1) / 4, "bn1 -> conv"),
    "negation by product": (lambda t, h: h.mul_(-1), "bn1 -> conv"),
    "add": (lambda t, h: F.relu(h + t.side(h)), "relu(bn1 + bn_other) -> conv"),
    "difference of branches": (lambda t, h: h - t.side(h), ""),
    "the same twice": (lambda t, h: h + h, ""),
    "twice after a function": (lambda t, h: F.relu(h) + torch.tanh(h), ""),
    "swish spelled out": (lambda t, h: h * torch.sigmoid(h), ""),
    "hard-swish spelled out": (lambda t, h: h * F.relu6(h + 3) / 6, ""),
    "gate of another branch": (lambda t, h: h * torch.sigmoid(t.side(h)), "bn1 * sigmoid(bn_other) -> conv"),
    "two activations in a row": (lambda t, h: F.relu(F.relu(h)), ""),
    "sigmoid of a relu": (lambda t, h: torch.sigmoid(F.relu(h)), ""),
    "swish of a relu": (lambda t, h: swish(F.relu(h)), ""),
    "root of a relu": (lambda t, h: torch.sqrt(F.relu(h) + 0.1), ""),
    "data-dependent branch": (lambda t, h: through_relu(h), "relu(bn1) -> conv"),
    "halves exchanged": (lambda t, h: torch.cat(h.chunk(2, 1)[::-1], 1), "[bn1, bn1] -> conv"),
    "gated halves": (lambda t, h: (lambda a, b: torch.cat([a * torch.sigmoid(b), b], 1))(*h.chunk(2, 1)), ""),
    "shuffle": (lambda t, h: shuffled(h), "bn1 -> conv"),
    "native shuffle": (lambda t, h: nn.ChannelShuffle(4)(h), "bn1 -> conv"),
    "channels reversed by index": (lambda t, h: h[:, [7, 6, 5, 4, 3, 2, 1, 0]], "bn1 -> conv"),
    "channels last and back": (lambda t, h: F.relu(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), "relu(bn1) -> conv"),
    "flattened and back": (lambda t, h: h.flatten(2).view_as(h), "bn1 -> conv"),
    "strided": (lambda t, h: h[:, :, ::2, ::2], "bn1 -> conv"),
    "clone and detach": (lambda t, h: h.clone().detach().contiguous(), "bn1 -> conv"),
    "dropout": (lambda t, h: nn.Dropout(0.0)(h), "bn1 -> conv"),
    "half of the channels rectified": (lambda t, h: torch.cat([F.relu(h[:, :4]), h[:, 4:]], 1), ""),
    "layer scale": (lambda t, h: h * t.scale, "scale * bn1 -> conv"),
    "layer scale first": (lambda t, h: t.scale * h, "scale * bn1 -> conv"),
    "layer scale in place": (lambda t, h: h.mul_(t.scale), "scale * bn1 -> conv"),
    "layer scale of a view": (lambda t, h: F.relu(h) * t.scale.flatten().view(1, -1, 1, 1), ""),
    "layer scale by a function": (lambda t, h: h * torch.exp(t.scale).clamp(max=2.0), ""),
    "layer scale of channels last": (lambda t, h: (h.movedim(1, -1) * t.scale.view(8)).movedim(-1, 1), ""),
    "quotient by a parameter": (lambda t, h: h / t.scale, "reciprocal(scale) * bn1 -> conv"),
    "learned shift": (lambda t, h: F.relu(h + t.scale), ""),
    "learned shift subtracted": (lambda t, h: F.gelu(h - t.scale), ""),
    "less than a learned shift": (lambda t, h: F.relu(t.scale - h), ""),
    "scaled by a scalar parameter": (lambda t, h: h * t.scale[0, 0, 0, 0], ""),
    "scaled activation": (lambda t, h: t.scale[:, :1] * F.relu(h) ** 2 + t.scale[:, 1:2], ""),
    "residual of a scaled function": (lambda t, h: h + t.scale * F.silu(h), ""),
    "swish with a learned slope": (lambda t, h: h * torch.sigmoid(t.scale * h), ""),
    "one of two parameters": (lambda t, h: h * t.scale.chunk(2, 1)[1].repeat(1, 2, 1, 1), ""),
    "parameter repeated over positions": (lambda t, h: h * t.scale.repeat(1, 1, 8, 8), ""),
    "cube": (lambda t, h: h.pow(3) / 10, ""),
    "gated linear unit": (lambda t, h: torch.cat([F.glu(h, 1), t.side(h)[:, :4]], 1), ""),
    "batch cut and joined": (lambda t, h: torch.cat(h.split(1), 0), "bn1 -> conv"),
}


@pytest.mark.parametrize("name", PREDICTED)
def test_prior_is_right(name: str) -> None:
    between, words = PREDICTED[name]
    model = Trap(between)
    graph = trace(model, EXAMPLE)
    assert "bn2" in graph.priors, graph.reasons
    if words:
        assert describe(graph, graph.priors["bn2"]) == words
    batch = images(300) if name == "batch cut and joined" else images()
    assert_right(predicted(model, EXAMPLE)["bn2"], sampled(model, batch)["bn2"])


# Whatever stands here need not be understood, but must not be misunderstood.
DOUBTFUL: dict[str, Between] = {
    "shifted sum": lambda t, h: h[:, :, 1:] + h[:, :, :-1],
    "shifted difference": lambda t, h: h[:, :, 1:] - h[:, :, :-1],
    "shifted product": lambda t, h: h[:, :, 1:] * h[:, :, :-1],
    "even and odd positions": lambda t, h: h[..., ::2] + h[..., 1::2],
    "flip": lambda t, h: h - h.flip(3),
    "parameter spread over the features": lambda t, h: h * t.scale.expand_as(h),
    "parameter viewed like the features": lambda t, h: h + t.scale.expand_as(h),
    "layer scale": lambda t, h: h * t.scale,
    "layer scale first": lambda t, h: t.scale * h,
    "layer scale in place": lambda t, h: h.mul_(t.scale),
    "layer scale of a view": lambda t, h: h * t.scale.view(1, -1, 1, 1),
    "learned shift": lambda t, h: h + t.scale,
    "scaled by a scalar parameter": lambda t, h: h * t.scale[0, 0, 0, 0],
    "scalar tensor": lambda t, h: h * torch.tensor(3.0),
    "constant tensor": lambda t, h: h * torch.full((8, 1, 1), 3.0),
    "power": lambda t, h: h**2,
    "product with itself": lambda t, h: h * h,
    "quotient": lambda t, h: h / (1 + h.abs()),
    "number by tensor": lambda t, h: 1 / (2 + torch.sigmoid(h)),
    "maximum": lambda t, h: torch.maximum(h, t.side(h)),
    "where": lambda t, h: torch.where(h > 0, h, 0.5 * h),
    "weighted add": lambda t, h: torch.add(h, t.side(h), alpha=3),
    "reversed weighted sub": lambda t, h: torch.rsub(h, t.side(h), alpha=2),
    "lerp": lambda t, h: torch.lerp(h, t.side(h), 0.2),
    "addcmul": lambda t, h: torch.addcmul(h, h, t.side(h), value=2.0),
    "softmax": lambda t, h: F.softmax(h, 1),
    "glu": lambda t, h: torch.cat([F.glu(h, 1)] * 2, 1),
    "layer norm": lambda t, h: F.layer_norm(h, h.shape[1:]),
    "instance norm": lambda t, h: F.instance_norm(h),
    "matrix product": lambda t, h: torch.einsum("nchw,cd->ndhw", h, torch.eye(8)),
    "zero pad of channels": lambda t, h: F.pad(h[:, :6], (0, 0, 0, 0, 1, 1)),
    "cumulative sum": lambda t, h: h.cumsum(1),
    "rounding": lambda t, h: h.round(),
    "floor division": lambda t, h: torch.div(h, 0.5, rounding_mode="floor"),
    "stacked images": lambda t, h: torch.stack([F.relu(image) for image in h]),
    "autograd function": lambda t, h: Square.apply(h),
    "scalars kept in numpy": lambda t, h: h * float(torch.ones(()).numpy()) * 3,
    "masked": lambda t, h: h.masked_fill(h < 0, 0.0),
    "bernoulli noise": lambda t, h: h * torch.bernoulli(torch.full_like(h, 0.5)),
    "gaussian noise": lambda t, h: h + 2 * torch.randn_like(h),
    "exponential of a relu": lambda t, h: torch.exp(-F.relu(h)),
    "product of three": lambda t, h: h * torch.sigmoid(h) * torch.tanh(h),
    "residual of a function": lambda t, h: h - torch.tanh(h),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_prior_is_right_or_absent(name: str) -> None:
    model = Trap(DOUBTFUL[name], kernel=1)
    graph = trace(model, EXAMPLE)
    if "bn2" in graph.priors:
        batch = images(400) if name == "stacked images" else images()
        truth = sampled(model, batch)["bn2"]
        assert_right(predicted(model, EXAMPLE)["bn2"], truth, variance=0.06)
    else:
        assert graph.reasons["bn2"]


@pytest.mark.parametrize("name", ["add", "multiply"])
def test_parameter_for_each_position_counts_by_its_moments(name: str) -> None:
    def embedded(trap: Trap, h: Tensor) -> Tensor:
        return torch.add(h, trap.table) if name == "add" else torch.mul(trap.table, h)

    model = Trap(embedded, kernel=1)
    model.table = nn.Parameter(torch.randn(8, 32, 32))
    prior = predicted(model, torch.randn(2, 3, 32, 32))["bn2"]
    assert_right(prior, sampled(model, images(100, 32))["bn2"], mean=0.06, variance=0.1)


def write_through_view(trap: Trap, h: Tensor) -> Tensor:
    h[:, :4].relu_()
    return h


def assign_slice(trap: Trap, h: Tensor) -> Tensor:
    h[:, :4] = 0.0
    return h


def assign_features(trap: Trap, h: Tensor) -> Tensor:
    canvas = torch.zeros_like(h)
    canvas[:, 4:] = h[:, :4]
    return canvas


def write_into_base(trap: Trap, h: Tensor) -> Tensor:
    part = h[:, :]
    h.relu_()
    h.add_(1.0)
    return part * 1.0


def by_numpy(trap: Trap, h: Tensor) -> Tensor:
    return torch.from_numpy(h.detach().numpy() * 5)


def by_data(trap: Trap, h: Tensor) -> Tensor:
    h.data.mul_(5)
    return h


ABSENT: dict[str, tuple[Between, str]] = {
    "write through a view": (write_through_view, "in place"),
    "assignment to a slice": (assign_slice, "in place"),
    "assignment of features": (assign_features, "in place"),
    "write into the base of a view": (write_into_base, "in place"),
    "write into the data": (by_data, "in place"),
    "NumPy": (by_numpy, "without history"),
    "softmax": (lambda t, h: F.softmax(h, 1), "softmax"),
    "matmul": (lambda t, h: h.transpose(1, 3) @ torch.ones(8, 8), "made in the forward"),
    "scale that differs between positions": (lambda t, h: h * t.scale.view(8), "alike for all channels"),
    "shift that differs between positions": (lambda t, h: h + t.scale.view(8, 1), "alike for all channels"),
    "number read from a parameter": (lambda t, h: h * t.scale.mean().item(), "number read"),
    "number made of a parameter": (lambda t, h: h / float(t.scale.sum()), "number read"),
    "number read from the features": (lambda t, h: h - h.mean().item(), "number read"),
    "parameter by features": (lambda t, h: t.scale / h, "div of a parameter"),
    "constant tensor": (lambda t, h: h * torch.full((8, 1, 1), 3.0), "made in the forward"),
    "constant number": (lambda t, h: h * torch.tensor(3.0), "made in the forward"),
    "constant shift of a parameter": (lambda t, h: h * (t.scale + torch.full((1, 8, 1, 1), 3.0)), "with parameters"),
    "mean over channels": (lambda t, h: h - h.mean(1, keepdim=True), "mean over channels"),
    "pooling across channels": (
        lambda t, h: F.avg_pool1d(h.flatten(2).transpose(1, 2), 3, 1, 1).transpose(1, 2).view_as(h),
        "",
    ),
    "maximum across channels": (
        lambda t, h: F.max_pool1d(h.permute(0, 2, 3, 1).flatten(1, 2), 3, 1, 1).transpose(1, 2).view_as(h),
        "",
    ),
    "convolution across channels": (
        lambda t, h: F.conv1d(h.flatten(2).transpose(1, 2), t.scale.view(1, 8, 1)[:, :1].repeat(64, 64, 1)).view_as(h),
        "",
    ),
}


@pytest.mark.parametrize("name", ABSENT)
def test_there_is_no_prior_and_a_reason(name: str) -> None:
    between, words = ABSENT[name]
    graph = trace(Trap(between), EXAMPLE)
    assert "bn2" not in graph.priors
    assert graph.reasons["bn2"] and words in graph.reasons["bn2"]


@pytest.fixture
def scripted() -> Iterator[Between]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated, yet met

        @torch.jit.script
        def function(x):  # type: ignore[no-untyped-def]
            return x * torch.sigmoid(x)

        yield lambda trap, h: function(h)


def test_scripted_activation_has_no_history(scripted: Between) -> None:
    graph = trace(Trap(scripted), EXAMPLE)
    assert "bn2" not in graph.priors and "without history" in graph.reasons["bn2"]
