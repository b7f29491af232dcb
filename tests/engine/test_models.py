"""Networks by name: their sizes in the literature, their shapes, and names that do not exist."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tiny_runs import tiny
from torch import nn
from torch.nn import functional as F

from bkn_core.data.preprocess import Preprocess
from bkn_core.engine import build
from bkn_core.engine.build import build_model, load_splits
from bkn_core.engine.cifar_networks import CifarResNet
from bkn_core.engine.loop import train
from bkn_core.engine.models import (
    build_network,
    check_network,
    count_parameters,
    example_images,
    is_builtin,
)
from bkn_core.engine.tasks.classification import Classification
from bkn_core.errors import RecipeError
from bkn_core.kinds import KINDS
from bkn_core.layers.batch_kalman import BatchKalmanNorm

NAMES = ["cifar_plain", "cifar_resnet8", "cifar_preact_resnet8", "cifar_resnet20", "cifar_preact_resnet14"]
OUTPUT = Classification().output(torch.zeros(2), 5)


def layers(network: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("depth", [8, 20, 56, 110])
@pytest.mark.parametrize("preactivation", [False, True])
def test_a_residual_network_has_its_depth(depth: int, preactivation: bool) -> None:
    """Weighted layers on the longest path: 3×3 convolutions and the head, not the shortcuts."""
    network = CifarResNet(depth, preactivation=preactivation)
    deep = [m for m in layers(network, nn.Conv2d) if m.kernel_size == (3, 3)] + layers(network, nn.Linear)
    assert len(deep) == depth


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_a_residual_network_has_the_parameters_of_the_paper(depth: int, millions: float) -> None:
    """Table 6 of arXiv 1512.03385."""
    assert count_parameters(CifarResNet(depth)) / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize("name", ["cifar_plain", "cifar_resnet8", "cifar_preact_resnet8"])
def test_twice_the_width_is_nearly_four_times_the_parameters(name: str) -> None:
    with torch.device("meta"):
        narrow, wide = (build_network(name, classes=10, arguments={"width": width}) for width in (32, 64))
    assert 3.9 < count_parameters(wide) / count_parameters(narrow) < 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (3, (32, 32)), (3, (9, 14))])
def test_networks_take_images_of_any_colour_and_size(name: str, channels: int, size: tuple[int, int]) -> None:
    network = build_network(name, classes=7, channels=channels)
    logits = network(example_images(channels, size))
    assert logits.shape == (2, 7) and logits.isfinite().all()
    logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_a_block_is_the_sum_of_its_branches() -> None:
    block: Any = CifarResNet(8).stages[1][0].eval()
    x = torch.randn(2, 16, 6, 6)
    y = F.conv2d(F.relu(block.bn1(F.conv2d(x, block.conv1.weight, stride=2, padding=1))), block.conv2.weight, padding=1)
    shortcut = block.shortcut[1](F.conv2d(x, block.shortcut[0].weight, stride=2))
    torch.testing.assert_close(block(x), F.relu(block.bn2(y) + shortcut))


def test_a_preactivation_block_passes_its_input_on_unchanged() -> None:
    block: Any = CifarResNet(14, preactivation=True).stages[0][1].eval()
    x = torch.randn(2, 16, 6, 6)
    branch = block.conv2(F.relu(block.bn2(block.conv1(F.relu(block.bn1(x))))))
    torch.testing.assert_close(block(x), x + branch)


def test_convolutions_start_with_the_variance_of_he() -> None:
    for conv in layers(CifarResNet(56), nn.Conv2d):
        if conv.weight.numel() > 10_000:
            expected = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5
            assert conv.weight.std().item() == pytest.approx(expected, rel=0.05)


def test_our_own_names_are_known() -> None:
    assert all(is_builtin(name) for name in NAMES)
    assert not any(is_builtin(name) for name in ("resnet18", "timm:resnet18", "cifar_resnet", "cifar_plain2"))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "timm:resnet10t"])
def test_models_of_libraries_are_built_with_the_classes_asked_for(name: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    network = build_network(name, classes=6).eval()
    assert network(example_images(3, (64, 64))).shape == (2, 6)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnet81", r"'resnet81' \(did you mean 'resnet"),
        ("cifar_plian", "did you mean 'cifar_plain'"),
        ("cifar_resnet9", r"depth of 9\n.*did you mean 8"),
        ("cifar_resnet18", r"depth of 18\n.*did you mean 20"),
        ("cifar_resnet2", r"depth of 2\n.*did you mean 8"),
        ("cifar_resnet1208", r"depth of 1208\n.*8, 14, 20, 32 ... 1202 .did you mean 1202"),
        ("cifar_resnet99999999998", "model.name is 'cifar_resnet99999999998'"),
        ("cifar_resnet0", r"depth of 0\n.*did you mean 8"),
        ("", "Choose cifar_plain"),
        ("fcn_resnet50", "model.name is 'fcn_resnet50'"),
        ("../../etc/passwd", "model.name is"),
    ],
)
def test_a_name_that_does_not_exist_is_refused_with_the_nearest(name: str, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        build_network(name, classes=10)


@pytest.mark.parametrize("name", ["timm:nonsense", "timm:resnet18q"])
def test_a_name_that_timm_does_not_have_is_refused(name: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(RecipeError, match="timm has no model"):
        build_network(name, classes=10)


def test_without_timm_its_models_are_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RecipeError, match="timm is not installed\npip install timm"):
        build_network("timm:resnet18", classes=10)


@pytest.mark.parametrize("name", ["cifar_plain", "cifar_resnet8", "resnet18", "timm:resnet10t"])
def test_arguments_that_do_not_fit_are_named(name: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    with pytest.raises(RecipeError, match=r"model\.args \{'nonsense': 3\} do not fit"):
        build_network(name, classes=10, arguments={"nonsense": 3})


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        (
            "mobilenet_v2",
            {"round_nearest": 0},
            "do not fit model.name 'mobilenet_v2': integer division or modulo by zero",
        ),
        ("mobilenet_v2", {"width_mult": 1e9}, "do not fit model.name 'mobilenet_v2': "),
    ],
)
def test_arguments_that_break_the_builder_are_named(name: str, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        build_network(name, classes=10, arguments=arguments)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"name": "alexnet"}, r"'alexnet' cannot take images of 32 x 32: .*\n.*data.image_size"),
        (
            {"name": "googlenet", "arguments": {"aux_logits": True}},
            "'googlenet' cannot take|makes of images .* not one",
        ),
    ],
)
def test_images_that_a_network_cannot_take_are_refused(words: dict[str, Any], match: str) -> None:
    before = torch.get_rng_state()
    network = build_network(**words, classes=5)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.set_rng_state(before)
    with pytest.raises(RecipeError, match=match):
        check_network(network, words["name"], example_images(3, (32, 32)), *OUTPUT)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_a_network_without_logits_for_each_class_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"makes of images of 8 x 8 the shape \(2, 4\), not one logit for each of 5"):
        check_network(
            build_network("cifar_plain", classes=4),
            "cifar_plain",
            example_images(3, (8, 8)),
            *Classification().output(torch.zeros(2), 5),
        )


def test_the_input_is_measured_in_as_small_parts_as_its_images_need(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny()
    splits = load_splits(recipe)
    expected = build_model(recipe, splits.preprocess, 10, images=splits.train).get_buffer("features.0.input_mean")
    monkeypatch.setattr(build, "_PRIOR_BYTES", 5 * 4 * 64 + 255)
    parts = [len(batch) for batch in build._prior_batches(splits.train, splits.preprocess)]
    assert parts == [5] * 7 + [1]
    found = build_model(recipe, splits.preprocess, 10, images=splits.train).get_buffer("features.0.input_mean")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("argument", ["classes", "num_classes", "channels", "in_chans", "weights", "depth"])
@pytest.mark.parametrize("name", ["cifar_plain", "cifar_resnet8", "resnet18", "timm:resnet10t"])
def test_arguments_that_the_recipe_has_elsewhere_are_refused(name: str, argument: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    with pytest.raises(RecipeError, match="do not fit"):
        build_network(name, classes=10, arguments={argument: 3})


def test_a_name_is_no_recipe() -> None:
    preprocess: Any = None
    for call in (lambda name: train(name), lambda name: build_model(name, preprocess, 10), load_splits):
        with pytest.raises(RecipeError, match="the recipe is 'digits_micro'"):
            call("digits_micro")


def test_building_converts_every_norm_layer_and_measures_the_input() -> None:
    recipe = tiny("model.name=cifar_resnet8")
    splits = load_splits(recipe)
    model = build_model(recipe, splits.preprocess, 10, images=splits.train)
    assert not [m for m in layers(model, nn.BatchNorm2d) if not isinstance(m, BatchKalmanNorm)]
    assert all(layer.expects_prior and layer.statistics_batch_size == 2 for layer in layers(model, BatchKalmanNorm))
    inputs = (
        splits.train.batch(torch.arange(36))[0].double() / 255 - splits.preprocess.mean[0]
    ) / splits.preprocess.std[0]
    measured = model.get_buffer("conv1.input_mean")
    patches = F.unfold(inputs, 3, padding=1)
    torch.testing.assert_close(measured.double().flatten(), patches.mean((0, 2)), rtol=1e-4, atol=1e-5)


def test_a_model_without_images_has_room_for_what_was_measured_with_them() -> None:
    recipe = tiny()
    splits = load_splits(recipe)
    with_images = build_model(recipe, splits.preprocess, 10, images=splits.train)
    without = build_model(recipe, splits.preprocess, 10)
    without.load_state_dict(with_images.state_dict())
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(with_images.train()(images), without.train()(images))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_norm_builds_and_answers(kind: str) -> None:
    model = build_model(tiny(f"norm.kind={kind}"), Preprocess("L", (8, 8), (0.0,), (1.0,)), 10)
    assert model(torch.randn(4, 1, 8, 8)).isfinite().all()


WITH_A_DECAY_OF_THEIR_OWN = {"mabn", "online", "reference", "fixed", "normprop"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_epsilon_and_momentum_are_the_recipes_in_every_kind_of_norm(kind: str) -> None:
    model = build_model(
        tiny(f"norm.kind={kind}", "norm.eps=0.25", "norm.momentum=0.5"), Preprocess("L", (8, 8), (0.0,), (1.0,)), 10
    )
    norms = [module for module in model.modules() if hasattr(module, "eps")]
    assert len(norms) == 6 and all(norm.eps == 0.25 for norm in norms)
    momentum = None if kind in WITH_A_DECAY_OF_THEIR_OWN else 0.5
    assert all(getattr(norm, "momentum", momentum) == momentum for norm in norms)


def test_epsilon_and_momentum_of_null_are_the_networks_own() -> None:
    recipe = tiny("model.name=mobilenet_v3_small")
    model = build_model(recipe, Preprocess("RGB", (32, 32), (0.0,) * 3, (1.0,) * 3), 10)
    assert {(norm.eps, norm.momentum) for norm in layers(model, BatchKalmanNorm)} == {(1e-3, 1e-2)}
