"""All priors by the CPU kernels against their interpreter node by node in float64."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from bkn_core.convert import convert
from bkn_core.filter.kalman import Gaussian
from bkn_core.ops import kernels
from bkn_core.priors.hooks import find_hooks
from bkn_core.priors.sources import Predictions

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(7))


class Structures(nn.Module):
    """Every operation that the kernels know, one weight used twice, and a norm layer on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm0 = nn.BatchNorm2d(3)
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, (3, 1), padding=(1, 0))
        self.norm2, self.norm3 = nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 16, 3, groups=4, bias=False)
        self.norm4 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32)
        self.norm5 = nn.BatchNorm2d(32)
        self.side, self.norm8 = nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32)
        self.gate = nn.Conv2d(32, 32, 1)
        self.norm6 = nn.BatchNorm2d(32)
        self.head, self.norm7 = nn.Linear(32, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        """Wire them."""
        x = F.relu(self.norm1(self.stem(self.norm0(x))))
        y = F.relu(self.norm2(self.twice(x)))
        y = 0.5 * F.relu(self.norm3(self.twice(y))) + x - 0.25
        y = self.norm4(self.grouped(y))
        y = torch.cat((y[:, 8:], F.relu(y), y[:, :8]), 1)
        y = y.view(len(y), 2, 16, *y.shape[2:]).transpose(1, 2).flatten(1, 2)
        y = self.norm5(self.depthwise(y))
        y = self.norm6(self.gate(F.relu(y) * F.relu(self.norm8(self.side(y)))))
        return self.norm7(self.head(y.mean((2, 3))))


def drawn(model: nn.Module, images: Tensor = IMAGES) -> nn.Module:
    """A converted model away from its initial values."""
    converted = convert(model, images[:1], statistics_batch_size=2, input_prior=images).train()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in converted.named_buffers():
            if name.endswith("innovation"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return converted


def predictions(model: nn.Module) -> tuple[Predictions, bool]:
    """The priors of the layers that have one, the gains of all, and whether the kernels alone made them."""
    owner, hooks = find_hooks(model)
    found = hooks.predictions(owner, hooks.layers(owner))
    return found, hooks.lowered is not None and hooks.lowered.is_whole


def priors(model: nn.Module) -> dict[str, Gaussian]:
    return predictions(model)[0][0]


def gradients(model: nn.Module, found: Predictions) -> dict[str, Tensor]:
    """Of a sum of the priors and the gains with fixed weights."""
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(9)
    total: Tensor = torch.zeros(())
    for values in (*itertools.chain.from_iterable(found[0].values()), *found[1].values()):
        weights = torch.randn(values.shape, generator=generator, dtype=torch.float64)
        total = total + (values * weights.to(values.dtype)).sum()
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual: Tensor, exact: Tensor, scale: Tensor, name: str) -> None:
    assert ((actual.double() - exact).abs() <= 1e-5 * (1e-3 + scale)).all(), name


def assert_equal_to_float64(model: nn.Module, *, is_whole: bool = True) -> None:
    wide = copy.deepcopy(model).double()
    found, is_native = predictions(model)
    assert is_native == is_whole
    expected, _ = predictions(wide)
    assert list(found[0]) == list(expected[0])
    for name, prior in found[0].items():
        exact_prior = expected[0][name]
        assert_close(prior.mean, exact_prior.mean, exact_prior.variance.sqrt(), name)
        assert_close(prior.variance, exact_prior.variance, exact_prior.variance, name)
    for gain, exact_gain in zip(found[1].values(), expected[1].values(), strict=True):
        assert_close(gain, exact_gain, exact_gain, "gain")
    actual, exact = gradients(model, found), gradients(wide, expected)
    assert actual.keys() == exact.keys()
    for name in exact:
        assert_close(actual[name], exact[name], exact[name].abs().max(), name)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_known_operation(memory_format: torch.memory_format) -> None:
    model = drawn(Structures()).to(memory_format=memory_format)  # type: ignore[call-overload]
    assert_equal_to_float64(model)
    for name in ("twice.weight", "norm1.weight", "norm4.bias"):
        model.get_parameter(name).requires_grad_(False)
    assert_equal_to_float64(model)


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "mobilenet_v3_small"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_networks(name: str, memory_format: torch.memory_format) -> None:
    model = drawn(models.get_model(name, weights=None, num_classes=3), torch.randn(2, 3, 32, 32))
    assert_equal_to_float64(model.to(memory_format=memory_format))  # type: ignore[call-overload]


NETWORKS = """vgg11_bn mobilenet_v2 mobilenet_v3_large mnasnet0_5 googlenet densenet121 resnext50_32x4d regnet_y_400mf
regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3
efficientnet_b4 efficientnet_b5 efficientnet_v2_s"""


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS.split())
def test_all_lines_of_a_network(name: str) -> None:
    options = {"init_weights": False} if name == "googlenet" else {}
    assert_equal_to_float64(drawn(models.get_model(name, weights=None, **options), torch.randn(2, 3, 64, 64)))


@pytest.mark.slow
def test_a_network_for_segmentation() -> None:
    model = models.get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None)
    assert_equal_to_float64(drawn(model, torch.randn(2, 3, 64, 64)))


@pytest.mark.slow
def test_a_network_with_attention_and_layer_normalization() -> None:
    model = models.get_model("maxvit_t", weights=None)
    assert_equal_to_float64(drawn(model, torch.randn(2, 3, 224, 224)), is_whole=False)


def test_a_fresh_network_whose_means_lie_on_the_kink_of_a_rectifier() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
            self.second, self.norm2 = nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm2(self.second(F.max_pool2d(F.relu(self.norm1(self.first(x))), 2)))

    assert_equal_to_float64(convert(Pooled(), IMAGES[:1], statistics_batch_size=2, input_prior=IMAGES).train())


def test_gradients_are_those_of_the_forward_though_inflations_move() -> None:
    model = drawn(Structures())
    found, _ = predictions(model)
    exact = gradients(model, predictions(model)[0])
    for name, buffer in model.named_buffers():
        if name.endswith("innovation"):
            buffer.add_(1.0)
    for name, gradient in gradients(model, found).items():
        assert torch.equal(gradient, exact[name])


def test_weights_changed_before_the_backward_pass_are_refused() -> None:
    model = drawn(Structures())
    found, _ = predictions(model)
    with torch.no_grad():
        model.get_parameter("stem.weight").add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(model, found)


def test_copies_carry_the_program_and_read_their_own_weights() -> None:
    model = drawn(Structures())
    priors(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        assert_equal_to_float64(other)
    assert_equal_to_float64(model)
