"""What a conversion keeps, what it puts in, and what it says about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import SmallResNet, assert_same, images, pretrained
from torch import nn

from bkn_core.convert import KINDS, conversion_report, convert
from bkn_core.errors import ConversionError
from bkn_core.layers.baselines import BatchRenorm, FrozenNorm
from bkn_core.layers.batch_kalman import BatchKalmanNorm, BatchKalmanNorm1d, BatchKalmanNorm2d
from bkn_core.layers.rivals.cross_iteration import CrossIterationNorm
from bkn_core.layers.rivals.group_kalman import GroupKalmanNorm
from bkn_core.layers.rivals.moving_average import MovingAverageNorm
from bkn_core.layers.rivals.online import OnlineNorm
from bkn_core.layers.rivals.propagation import NormalizationPropagation
from bkn_core.layers.rivals.reference import ReferenceNorm
from bkn_core.layers.rivals.response import EvoNorm, FilterResponseNorm
from bkn_core.layers.rivals.whitening import IterativeNorm

VARIANTS: list[dict[str, Any]] = [
    {},
    {"message": "raw"},
    {"transition": "learned"},
    {"transition": "learned", "covariance": "full"},
    {"gain": 0.02, "statistics_batch_size": 1},
    {"correction": False, "innovation": False, "learn_gain": False},
    {"statistics_batch_size": None},
]


def norms(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_conversion_is_pure(options: dict[str, Any], training: bool) -> None:
    model, x = pretrained(SmallResNet()).train(training), images()
    model.layer.eval()
    example = x.clone()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(id(m), type(m), m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    state, threads, dtype = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
    converted = convert(model, example, input_prior=x, **options)
    converted(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    assert_same(before, dict(model.state_dict()))
    assert torch.equal(example, x)
    assert modules == [
        (id(m), type(m), m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()
    ]
    assert all(p.grad is None for p in model.parameters())
    fresh = {n: m.training for n, m in convert(model, example, **options).named_modules()}
    assert all(fresh[n] == m.training for n, m in model.named_modules())


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_what_was_learned_survives_and_evaluation_is_equal(options: dict[str, Any]) -> None:
    model, x = pretrained(SmallResNet()).eval(), images()
    converted = convert(model, x, **options)
    state = converted.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(converted(x), model(x), rtol=1e-6, atol=1e-6)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in converted.parameters()}


def test_gain_one_is_batch_norm_in_training_too() -> None:
    model, x = pretrained(SmallResNet()).train(), images()
    converted = convert(model, x, gain=1.0, learn_gain=False, statistics_batch_size=None)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)
    names = dict(model.named_buffers())
    assert_same(names, {n: b for n, b in converted.named_buffers() if n in names}, 1e-6)
    assert {n for n, _ in converted.named_parameters()} == {n for n, _ in model.named_parameters()}


def test_include_and_exclude_are_name_patterns() -> None:
    model, x = SmallResNet(), images()
    converted = convert(model, x, include=("layer.*", "bn4"), exclude=("*.bn3",))
    kinds = {name: type(module) for name, module in norms(converted).items()}
    assert kinds == {
        "bn1": nn.BatchNorm2d,
        "layer.bn2": BatchKalmanNorm2d,
        "layer.bn3": nn.BatchNorm2d,
        "bn4": BatchKalmanNorm1d,
    }
    report = {r.name: r.prior for r in conversion_report(converted)}
    assert report == {"layer.bn2": "relu(bn1) -> layer.conv2", "bn4": "relu(layer.bn3 + relu(bn1)) -> linear"}
    converted(x).sum().backward()


@pytest.mark.parametrize("options", [{"message": "raw"}, {"transition": "learned"}], ids=str)
def test_layers_left_alone_still_send_messages(options: dict[str, Any]) -> None:
    converted = convert(SmallResNet(), images(), exclude=("bn1",), **options)
    assert converted(images()).isfinite().all()
    converted.bn1.eval()
    assert converted(images()).isfinite().all()


def test_patterns_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ConversionError, match=r"leave none of 4 layers"):
        convert(SmallResNet(), images(), exclude=("*bn*",))
    with pytest.raises(ConversionError, match="no batch normalization"):
        convert(nn.Linear(2, 2), torch.randn(2, 2))


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "bnk"},
        {"transition": "linear"},
        {"message": "posterior"},
        {"gain": 1.0},
        {"gain": -1.0},
        {"gain": 0.0},
        {"covariance": "half"},
    ],
    ids=str,
)
def test_arguments_that_do_not_exist_are_refused_by_name(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ConversionError, match=f"{name} is .?{value}"):
        convert(SmallResNet(), images(), **options)


EXPECTED = {
    "bn": BatchKalmanNorm,
    "brn": BatchRenorm,
    "gn": nn.GroupNorm,
    "ln": nn.GroupNorm,
    "in": nn.GroupNorm,
    "fixed": ReferenceNorm,
    "frozen": FrozenNorm,
    "reference": ReferenceNorm,
    "frn": FilterResponseNorm,
    "evonorm": EvoNorm,
    "iternorm": IterativeNorm,
    "gkn": GroupKalmanNorm,
    "normprop": NormalizationPropagation,
    "cbn": CrossIterationNorm,
    "gn_ws": nn.GroupNorm,
    "mabn": MovingAverageNorm,
    "online": OnlineNorm,
    "none": nn.Identity,
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_baselines_take_the_place_of_every_layer(kind: Any) -> None:
    model, x = pretrained(SmallResNet()).train(), images()
    converted = convert(model, x, kind=kind)
    for name in norms(model):
        assert isinstance(converted.get_submodule(name), EXPECTED[kind])
        if kind != "none":
            assert torch.equal(converted.get_submodule(name).weight, model.get_submodule(name).weight)
    y = converted(x)
    y.sum().backward()
    assert y.isfinite().all()
    with pytest.raises(ConversionError, match="not converted"):
        conversion_report(converted)


def test_every_kind_is_tested() -> None:
    assert {*EXPECTED, "bkn"} == set(KINDS)


def test_group_baselines_normalize_as_they_are_named() -> None:
    x = torch.randn(4, 16, 5, 5)
    plain = nn.Sequential(nn.BatchNorm2d(16))
    torch.testing.assert_close(convert(plain, x, kind="gn")(x), nn.GroupNorm(8, 16)(x))
    torch.testing.assert_close(convert(plain, x, kind="ln")(x), nn.functional.layer_norm(x, x.shape[1:]))
    torch.testing.assert_close(convert(plain, x, kind="in")(x), nn.functional.instance_norm(x), rtol=1e-4, atol=1e-5)
    grouped = convert(plain, x, kind="bn", statistics_batch_size=2)(x)
    expected = torch.cat([nn.BatchNorm2d(16)(part) for part in x.split(2)])
    torch.testing.assert_close(grouped, expected, rtol=1e-5, atol=1e-5)


def test_report_says_what_predicts_each_layer() -> None:
    model, x = SmallResNet(), images()
    with_images = conversion_report(convert(model, x, input_prior=x))
    assert [(r.name, r.channels, r.prior, r.reason) for r in with_images] == [
        ("bn1", 6, "input -> conv1", ""),
        ("layer.bn2", 6, "relu(bn1) -> layer.conv2", ""),
        ("layer.bn3", 6, "relu(layer.bn2) -> layer.conv3", ""),
        ("bn4", 8, "relu(layer.bn3 + relu(bn1)) -> linear", ""),
    ]
    without = conversion_report(convert(model, x))
    assert without[0].prior is None and "input_prior" in without[0].reason
    assert [r.prior for r in without[1:]] == [r.prior for r in with_images[1:]]
    assert conversion_report(nn.ModuleList([convert(model, x)])) == without


def test_report_of_gain_one_gives_a_reason() -> None:
    report = conversion_report(convert(SmallResNet(), images(), gain=1.0, learn_gain=False))
    assert len(report) == 4 and all(r.prior is None and "gain is 1" in r.reason for r in report)


def test_frozen_parameters_and_eval_layers_stay_so() -> None:
    model = SmallResNet()
    model.bn1.weight.requires_grad_(False)
    model.layer.eval()
    converted = convert(model, images())
    assert not converted.bn1.weight.requires_grad and converted.bn1.bias.requires_grad
    assert not converted.layer.bn2.training and converted.bn4.training


def test_layers_without_a_bias_stay_without() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, bias=False)
    )
    converted = convert(model, images())
    assert converted[4].bias is None
    converted(images()).sum().backward()


def test_norm_that_is_the_whole_model_is_converted() -> None:
    x = torch.randn(6, 5, 3, 3)
    converted = convert(nn.BatchNorm2d(5), x, input_prior=x)
    assert isinstance(converted, BatchKalmanNorm2d)
    assert conversion_report(converted)[0].prior == "input"
    converted(x).sum().backward()


def test_shared_layers_stay_shared() -> None:
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.ReLU(), nn.Conv2d(3, 3, 1), norm)
    converted = convert(model, torch.randn(2, 3, 4, 4))
    assert converted[1] is converted[4] and isinstance(converted[1], BatchKalmanNorm2d)
    assert "more than once" in conversion_report(converted)[0].reason
    converted(torch.randn(4, 3, 4, 4)).sum().backward()


def test_converting_again_changes_the_settings() -> None:
    model, x = pretrained(SmallResNet()), images()
    once = convert(model, x, statistics_batch_size=2, gain=0.3)
    once.layer.bn2.running_mean.add_(1)
    twice = convert(once, x, statistics_batch_size=4)
    reference = convert(model, x, statistics_batch_size=4)
    assert [r.prior for r in conversion_report(twice)] == [r.prior for r in conversion_report(reference)]
    assert twice.layer.bn2.statistics_batch_size == 4
    assert torch.equal(twice.layer.bn2.running_mean, once.layer.bn2.running_mean)
    assert len(twice._forward_pre_hooks) == len(reference._forward_pre_hooks)
    twice(x).sum().backward()
