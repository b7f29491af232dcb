"""Layers of every sort keep what they learned on the way in and on the way back, and stay what they were to others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_models import SmallResNet, assert_same, every_variant, images, pretrained, step
from timm.layers import BatchNormAct2d
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from bkn_core.convert import conversion_report, convert, to_batch_norm
from bkn_core.errors import ConversionError
from bkn_core.layers.batch_kalman import BatchKalmanNorm


def chain(first: nn.Module, second: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), first, nn.ReLU(), nn.Conv2d(6, 6, 1), second)


class Tied(nn.Module):
    """Two convolutions and two norm layers with one set of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.conv3.weight = self.conv2.weight
        self.bn3.weight, self.bn3.bias = self.bn2.weight, self.bn2.bias

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.stem(x))))))
        result: Tensor = self.bn3(self.conv3(h))
        return result


class Containers(nn.Module):
    """Pre-activation, with layers in a dict, a list, and scales in a list of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.norms = nn.ModuleDict({key: nn.BatchNorm2d(6) for key in "ab"})
        self.convs = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1) for _ in "ab"])
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1, 6, 1, 1)) for _ in "ab"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for key, conv, scale in zip("ab", self.convs, self.scales, strict=True):
            x = x + scale * conv(F.relu(self.norms[key](x)))
        return x


def empty_scales() -> nn.Module:
    model = chain(nn.BatchNorm2d(6), nn.BatchNorm2d(6))
    for index in (1, 4):
        nn.init.zeros_(model[index].weight)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "residual": SmallResNet,
    "fused with an activation": lambda: chain(
        BatchNormAct2d(6, drop_layer=nn.Dropout), BatchNormAct2d(6, apply_act=False)
    ),
    "tied": Tied,
    "containers": Containers,
    "without affine": lambda: chain(nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6, affine=False)),
    "cumulative average": lambda: chain(nn.BatchNorm2d(6, momentum=None), nn.BatchNorm2d(6, momentum=None)),
    "scales of zero": empty_scales,
    "norm of the input": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)),
    "after a pool": lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.AvgPool2d(2), nn.BatchNorm2d(6)),
    "float64": lambda: SmallResNet().double(),
    "bfloat16": lambda: SmallResNet().bfloat16(),
    "float16": lambda: SmallResNet().half(),
    "synchronized": lambda: chain(nn.SyncBatchNorm(6), nn.SyncBatchNorm(6)).eval(),
}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_gives_the_model_back(name: str) -> None:
    model = MODELS[name]()
    pretrained(model) if name != "scales of zero" else None
    x = images().to(next(model.parameters()).dtype)
    converted = convert(model, x)
    back = to_batch_norm(converted)
    kinds = {n: type(m) for n, m in model.named_modules()}
    assert kinds == {n: type(m) for n, m in back.named_modules()}
    assert_same(dict(model.state_dict()), dict(back.state_dict()))
    model.eval()
    assert torch.equal(converted.eval()(x), model(x))
    assert torch.equal(back.eval()(x), model(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in back.modules())


@every_variant
@pytest.mark.parametrize("name", MODELS)
def test_every_sort_of_layer_trains(name: str, options: dict[str, str]) -> None:
    model = MODELS[name]()
    x = images().to(next(model.parameters()).dtype)
    converted = convert(model, x, **options).train()
    for _ in range(2):
        converted(x).float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in converted.parameters())
    assert all(b.isfinite().all() for b in converted.buffers())


def test_statistics_keep_a_type_of_their_own() -> None:
    norm = nn.BatchNorm2d(6)
    norm.weight, norm.bias = (nn.Parameter(p.detach().bfloat16()) for p in (norm.weight, norm.bias))
    converted = convert(nn.Sequential(nn.Conv2d(3, 6, 1), norm), images())
    assert (converted[1].weight.dtype, converted[1].running_var.dtype) == (torch.bfloat16, torch.float32)


def test_tied_parameters_stay_tied() -> None:
    model = Tied()
    converted = convert(model, images())
    for tied in (converted, to_batch_norm(converted), convert(model, images(), kind="gn")):
        assert tied.bn3.weight is tied.bn2.weight and tied.bn3.bias is tied.bn2.bias
        assert tied.conv3.weight is tied.conv2.weight and tied.bn1.weight is not tied.bn2.weight
        assert tied.bn2.weight is not model.bn2.weight
    converted(images()).square().mean().backward()
    assert converted.bn2.weight.grad is not None


def test_converted_layers_are_batch_norm_layers_to_code_that_asks() -> None:
    model = SmallResNet()
    converted = convert(model, images())
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d):
        wanted = [n for n, m in model.named_modules() if isinstance(m, kind)]
        assert [n for n, m in converted.named_modules() if isinstance(m, kind)] == wanted


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Conditional(nn.BatchNorm2d):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return scale * super().forward(x)


class Renamed(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("norm", [Doubled(6), Conditional(6), SplitBatchNorm2d(6, num_splits=2)])
def test_layers_that_do_more_are_refused_by_name(norm: nn.Module) -> None:
    with pytest.raises(ConversionError, match=rf"4 is a {type(norm).__name__}.*\n.*exclude=\('4',\)"):
        convert(chain(nn.BatchNorm2d(6), norm), images())


def test_what_is_refused_may_be_left_out() -> None:
    model = chain(nn.BatchNorm2d(6), Doubled(6)).eval()
    converted = convert(model, images(), exclude=("4",))
    assert type(converted[4]) is Doubled
    x = images()
    assert torch.equal(converted.eval()(x), model(x))


def test_subclasses_that_do_the_same_are_converted() -> None:
    converted = convert(chain(nn.BatchNorm2d(6), Renamed(6)), images())
    assert isinstance(converted[4], BatchKalmanNorm)
    assert type(to_batch_norm(converted)[4]) is Renamed


def test_lazy_layers_are_refused_until_their_shape_is_known() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.LazyBatchNorm2d())
    with pytest.raises(ConversionError, match=r"1 is a lazy layer"):
        convert(model, images())
    model(images())
    assert isinstance(convert(model, images())[1], BatchKalmanNorm)


def test_models_that_cannot_be_copied_are_refused() -> None:
    model = chain(nn.BatchNorm2d(6), nn.BatchNorm2d(6))
    model.last = model(images())
    with pytest.raises(ConversionError, match="cannot be copied"):
        convert(model, images())


def test_synchronized_layers_made_after_conversion_are_refused_and_can_be_converted() -> None:
    model, x = pretrained(SmallResNet()), images()
    replaced = nn.SyncBatchNorm.convert_sync_batchnorm(convert(model, x))
    for mode in (True, False):
        with pytest.raises(ConversionError, match="bn1 is a SyncBatchNorm"):
            replaced.train(mode)(x)
    again = convert(replaced, x)
    assert [r.prior for r in conversion_report(again)] == [r.prior for r in conversion_report(convert(model, x))]
    assert len(again._forward_pre_hooks) == 1
    step(again.train(), x)
