"""Priors behind single operations against the operations themselves, run on independent Gaussian channels."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from brute_force import Trap, assert_right, images, predicted, sampled
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import activation

from bkn_core.filter.kalman import Gaussian
from bkn_core.filter.spatial import maximum, normalized, transposed_convolution
from bkn_core.graph.operations import FUNCTIONS, describe
from bkn_core.graph.trace import trace

EXAMPLE = images(3)

# Those whose results depend on other channels or positions.
ACROSS = {"MultiheadAttention", "Softmin", "Softmax", "Softmax2d", "LogSoftmax"}
ACTIVATIONS = sorted(set(activation.__all__) - ACROSS)
ARGUMENTS = {"Threshold": (0.1, -0.5), "PReLU": (8,)}


def between_norms(module: nn.Module, channels: int = 8) -> Trap:
    """A model with a module between two normalization layers."""
    model = Trap(lambda trap, h: trap.module(h), channels=channels, kernel=1)
    model.module = module
    return model


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_of_torch_has_a_prior(name: str, in_place: bool) -> None:
    kind = getattr(nn, name)
    options = {"inplace": True} if in_place and "inplace" in inspect.signature(kind).parameters else {}
    if name == "GLU":
        options = {"dim": 1}
    model = between_norms(kind(*ARGUMENTS.get(name, ()), **options), 4 if name == "GLU" else 8)
    assert "bn2" in trace(model, EXAMPLE).priors
    assert_right(predicted(model, EXAMPLE)["bn2"], sampled(model, images())["bn2"], variance=0.06)


@pytest.mark.parametrize("name", sorted(ACROSS - {"MultiheadAttention"}))
def test_activation_across_channels_has_a_reason(name: str) -> None:
    options = {} if name == "Softmax2d" else {"dim": 1}
    assert "softm" in trace(between_norms(getattr(nn, name)(**options)), EXAMPLE).reasons["bn2"]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_follow_one_another(name: str) -> None:
    first = getattr(nn, name)(*ARGUMENTS.get(name, ()), **({"dim": 1} if name == "GLU" else {}))
    model = between_norms(nn.Sequential(first, nn.Softplus()), 4 if name == "GLU" else 8)
    if name == "GLU":  # a product of two channels is no Gaussian any more
        assert "bn2" in trace(model, EXAMPLE).priors
    else:
        assert_right(predicted(model, EXAMPLE)["bn2"], sampled(model, images())["bn2"], variance=0.06)


TRANSPOSED = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 4, "stride": 2, "groups": 2},
    {"kernel_size": 3, "stride": 1, "dilation": 2},
    {"kernel_size": 3, "stride": (3, 2), "dilation": (2, 1)},
    {"kernel_size": (1, 3), "stride": 4, "bias": False},
]


@pytest.mark.parametrize("options", TRANSPOSED, ids=str)
def test_transposed_convolution_is_exact_over_all_phases(options: dict[str, object]) -> None:
    conv = nn.ConvTranspose2d(8, 6, **options)  # type: ignore[arg-type]
    message = Gaussian(torch.randn(8), torch.rand(8) + 0.5)
    x = torch.randn(300, 8, 16, 16) * message.variance.sqrt().view(8, 1, 1) + message.mean.view(8, 1, 1)
    with torch.no_grad():
        inner = conv(x)[:, :, 12:-12, 12:-12] if conv.stride != (1, 1) else conv(x)[:, :, 4:-4, 4:-4]
        inner = inner[:, :, : inner.shape[2] // conv.stride[0] * conv.stride[0]]
        inner = inner[..., : inner.shape[3] // conv.stride[1] * conv.stride[1]]
        prior = transposed_convolution(
            message, conv.weight, conv.bias, groups=conv.groups, stride=conv.stride, dilation=conv.dilation
        )
    assert_right(prior, Gaussian(inner.mean((0, 2, 3)), inner.var((0, 2, 3))), variance=0.08)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_transposed_convolution_is_found(rank: int) -> None:
    conv, norm = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), (nn.BatchNorm1d, nn.BatchNorm2d)
    norms = (*norm, nn.BatchNorm3d)
    first, second = norms[rank - 1](4), norms[rank - 1](6)
    stem = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](3, 4, 1)
    model = nn.Sequential(stem, first, nn.ReLU(), conv[rank - 1](4, 6, 2, 2), second)
    graph = trace(model, torch.randn(2, 3, *[4] * rank))
    assert describe(graph, graph.priors["4"]) == "relu(1) -> 3"
    sample = torch.randn(2000, 3, *[4] * rank) if rank < 3 else torch.randn(300, 3, 4, 4, 4)
    assert_right(predicted(model, sample[:2])["4"], sampled(model, sample)["4"], variance=0.08)


@pytest.mark.parametrize("count", [4, 9, 25])
@pytest.mark.parametrize(
    "function",
    [torch.relu, F.hardswish, F.silu, torch.abs, lambda x: x],
    ids=["relu", "hardswish", "silu", "abs", "identity"],
)
def test_maximum_of_independent_values_is_exact(function: object, count: int) -> None:
    assert callable(function)
    message = Gaussian(torch.linspace(-1, 2, 5), torch.tensor([1.0, 0.5, 1.0, 2.0, 4.0]))
    x = torch.randn(40000, count, 5) * message.variance.sqrt() + message.mean
    largest = function(x).amax(1)
    assert_right(maximum(message, function, count), Gaussian(largest.mean(0), largest.var(0)), variance=0.06)


def test_maximum_of_one_value_is_the_value() -> None:
    message = Gaussian(torch.tensor([0.3, -1.0]), torch.tensor([1.0, 0.2]))
    result = maximum(message, lambda x: x, 1)
    torch.testing.assert_close(result.mean, message.mean)
    torch.testing.assert_close(result.variance, message.variance)


def test_max_pool_knows_what_it_pools() -> None:
    joined = Trap(lambda t, h: F.max_pool2d(torch.cat([F.relu(h[:, :4]), F.relu(t.side(h)[:, 4:])], 1), 3), kernel=1)
    graph = trace(joined, EXAMPLE)
    assert describe(graph, graph.priors["bn2"]) == "[max_pool(relu(bn1)), max_pool(relu(bn_other))] -> conv"
    smooth = Trap(lambda t, h: F.max_pool2d(F.relu(h), 2), kernel=1)
    prior = predicted(smooth, EXAMPLE)["bn2"]
    plain = predicted(Trap(lambda t, h: F.relu(h), kernel=1), EXAMPLE)["bn2"]
    assert prior.mean.isfinite().all() and not torch.allclose(prior.mean, plain.mean, atol=0.05)


def test_averages_keep_the_mean_and_lower_the_variance() -> None:
    several = {
        "module": (lambda t, h: F.avg_pool2d(F.relu(h), 2), 4),
        "adaptive": (lambda t, h: F.adaptive_avg_pool2d(F.relu(h), 1), 64),
        "mean": (lambda t, h: F.relu(h).mean((2, 3), keepdim=True), 64),
    }
    for between, count in several.values():
        torch.manual_seed(0)
        model = Trap(between, kernel=1)
        prior, same = predicted(model, EXAMPLE)["bn2"], Trap(lambda t, h: F.relu(h), kernel=1)
        same.load_state_dict(model.state_dict())
        unpooled = predicted(same, EXAMPLE)["bn2"]
        torch.testing.assert_close(prior.mean, unpooled.mean)
        torch.testing.assert_close(prior.variance, unpooled.variance / count**0.4)


class Normalized(nn.Module):
    """64 channels normalized by something else between two layers."""

    def __init__(self, norm: nn.Module, *, channels_last: bool = False) -> None:
        super().__init__()
        self.stem, self.bn1, self.norm = nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), norm
        self.conv, self.bn2 = nn.Conv2d(64, 8, 1), nn.BatchNorm2d(8)
        self.channels_last = channels_last
        for module in (self.bn1, norm):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # type: ignore[arg-type]
            nn.init.normal_(module.bias, 0.0, 0.5)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.stem(x)))
        h = self.norm(h.movedim(1, -1)).movedim(-1, 1) if self.channels_last else self.norm(h)
        result: Tensor = self.bn2(self.conv(h))
        return result


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(64), nn.GroupNorm(1, 64), nn.GroupNorm(4, 64), nn.InstanceNorm2d(64, affine=True)], ids=str
)
def test_other_normalization_has_a_prior(norm: nn.Module) -> None:
    model = Normalized(norm, channels_last=isinstance(norm, nn.LayerNorm))
    assert_right(predicted(model, EXAMPLE)["bn2"], sampled(model, images(300))["bn2"], mean=0.08, variance=0.12)


def test_layer_norm_over_positions_has_a_reason() -> None:
    model = between_norms(nn.LayerNorm([8, 8, 8]))
    assert "layer_norm across" in trace(model, EXAMPLE).reasons["bn2"]


@pytest.mark.parametrize("pointwise", [False, True])
def test_normalized_moments_have_zero_mean_and_unit_power(pointwise: bool) -> None:
    message = Gaussian(torch.randn(12), torch.rand(12))
    result = normalized(message, 3, 0.0, is_pointwise=pointwise)
    power = (result.mean.square() + result.variance).view(3, 4).mean(1)
    torch.testing.assert_close(power, torch.ones(3))
    torch.testing.assert_close(result.mean.view(3, 4).sum(1), torch.zeros(3), atol=1e-5, rtol=0)


def heads(h: Tensor) -> Tensor:
    return h.flatten(2).unflatten(1, (2, 4)).transpose(2, 3)  # (images, heads, positions, channels)


def together(h: Tensor) -> Tensor:
    return h.transpose(2, 3).reshape(len(h), 8, 8, 8)


ATTENTION = {
    "matmul": lambda w, v: w @ v,
    "transposed": lambda w, v: (v.transpose(2, 3) @ w.transpose(2, 3)).transpose(2, 3),
    "einsum": lambda w, v: torch.einsum("nhij,nhjd->nhid", w, v),
    "dropout": lambda w, v: F.dropout(w, 0.1, training=False).matmul(v),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_keeps_the_mean(name: str) -> None:
    def attend(trap: Trap, h: Tensor) -> Tensor:
        query = heads(trap.side(h))
        weights = (query @ query.transpose(2, 3) / 2).softmax(-1)
        return together(ATTENTION[name](weights, heads(h)))

    model = Trap(attend, kernel=1)
    prior, truth = predicted(model, EXAMPLE)["bn2"], sampled(model, images(300))["bn2"]
    torch.testing.assert_close(prior.mean, truth.mean, rtol=0.05, atol=0.03)
    assert (prior.variance > 0.9 * truth.variance).all()


def test_native_attention_keeps_the_mean() -> None:
    def attend(trap: Trap, h: Tensor) -> Tensor:
        query = heads(trap.side(h))
        return together(F.scaled_dot_product_attention(query, query, heads(h)))

    model = Trap(attend, kernel=1)
    prior, truth = predicted(model, EXAMPLE)["bn2"], sampled(model, images(300))["bn2"]
    torch.testing.assert_close(prior.mean, truth.mean, rtol=0.05, atol=0.03)


def wrong_way(w: Tensor, v: Tensor) -> Tensor:
    return w.transpose(2, 3) @ v  # the weights of a result sum to anything


def across_channels(w: Tensor, v: Tensor) -> Tensor:
    return v @ (v.transpose(2, 3) @ v).softmax(-1).transpose(2, 3)


@pytest.mark.parametrize("product", [wrong_way, across_channels])
def test_what_only_looks_like_attention_has_a_reason(product: object) -> None:
    def attend(trap: Trap, h: Tensor) -> Tensor:
        assert callable(product)
        query = heads(h)
        return together(product((query @ query.transpose(2, 3)).softmax(-1), heads(h)))

    assert trace(Trap(attend), EXAMPLE).reasons["bn2"]


class Gate(nn.Module):
    """Squeeze and excitation between two layers."""

    def __init__(self, gate: type[nn.Module], channels: int = 32) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels)
        self.down, self.up = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)
        self.gate, self.conv, self.bn2 = gate(), nn.Conv2d(channels, 8, 1), nn.BatchNorm2d(8)
        nn.init.uniform_(self.bn1.weight, 0.5, 1.5)
        nn.init.normal_(self.bn1.bias, 0.0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.stem(x)))
        excitation = self.gate(self.up(F.relu(self.down(h.mean((2, 3), keepdim=True)))))
        result: Tensor = self.bn2(self.conv(h * excitation))
        return result


@pytest.mark.parametrize("gate", [nn.Sigmoid, nn.Hardsigmoid])
def test_gates_are_close_to_independent(gate: type[nn.Module]) -> None:
    model = Gate(gate)
    assert_right(predicted(model, EXAMPLE)["bn2"], sampled(model, images(1000))["bn2"], mean=0.05, variance=0.1)


def test_call_that_nobody_foresaw_costs_a_prior_not_the_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a rule met what it does not know")

    monkeypatch.setitem(FUNCTIONS, "relu", broken)
    assert "not understood" in trace(Trap(lambda t, h: F.relu(h)), EXAMPLE).reasons["bn2"]


def test_meta_models_are_discovered() -> None:
    model = Trap(lambda t, h: together(heads(F.relu(h)) * 2))
    on_meta = trace(model.to("meta"), EXAMPLE.to("meta"))
    assert on_meta == trace(Trap(lambda t, h: together(heads(F.relu(h)) * 2)), EXAMPLE) or on_meta.reasons
    assert math.isfinite(len(list(itertools.chain(on_meta.priors, on_meta.reasons))))
