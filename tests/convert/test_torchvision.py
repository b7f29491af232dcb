"""Known architectures: every layer has a prior, and at random initialization it is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.convert import conversion_report, convert
from bkn_core.priors.hooks import find_hooks

MODELS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], int]] = {
    "resnet18": (torchvision.models.resnet18, {}, 64),
    "googlenet": (torchvision.models.googlenet, {"aux_logits": False, "init_weights": False}, 64),
    "densenet121": (torchvision.models.densenet121, {}, 128),
    "vgg11_bn": (torchvision.models.vgg11_bn, {}, 32),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, {}, 64),
}
LARGER = {
    "shufflenet_v2_x0_5": (torchvision.models.shufflenet_v2_x0_5, {}, 64),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, {}, 160),
    "efficientnet_b0": (torchvision.models.efficientnet_b0, {}, 64),
    "regnet_y_400mf": (torchvision.models.regnet_y_400mf, {}, 64),
    "mnasnet0_5": (torchvision.models.mnasnet0_5, {}, 64),
    "inception_v3": (torchvision.models.inception_v3, {"aux_logits": False, "init_weights": False}, 299),
    "resnext50": (torchvision.models.resnext50_32x4d, {}, 64),
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    build, options, side = {**MODELS, **LARGER}[name]
    model = build(**options).train()
    if name.startswith("vgg"):
        model.classifier = nn.Identity()  # a hundred million weights behind the last norm layer
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
        elif isinstance(module, nn.Dropout):
            module.eval()
    return model, torch.randn(8, 3, side, side)


def observed_variances(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Variance at the input of every layer while plain batch normalization normalizes."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            x = inputs[0]
            found[name] = x.var([d for d in range(x.dim()) if d != 1], correction=0)

        return hook

    replica = copy.deepcopy(model)
    for name, module in replica.named_modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        replica(images)
    return found


def check(name: str) -> None:
    model, images = built(name)
    layers = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    reports = conversion_report(convert(model, images[:2]))
    assert [r.name for r in reports] == layers
    assert [r.name for r in reports if r.prior is None] == layers[:1]
    converted = convert(model, images[:2], input_prior=images)
    assert all(r.prior for r in conversion_report(converted))
    root, hooks = find_hooks(converted)
    with torch.no_grad():
        priors = hooks.priors(root)
    truth = observed_variances(model, images)
    ratios = torch.cat([priors[n].variance / truth[n] for n in layers if truth[n].min() > 0])
    assert ratios.isfinite().all()
    assert 0.8 < float(ratios.median()) < 1.3
    torch.testing.assert_close(priors[layers[0]].variance, truth[layers[0]], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_predicted_and_the_median_is_right(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_larger_models_are_predicted_too(name: str) -> None:
    check(name)


def test_resnet18_reads_as_its_author_would_say_it() -> None:
    model, images = built("resnet18")
    words = {r.name: r.prior for r in conversion_report(convert(model, images[:1], input_prior=images))}
    assert words["bn1"] == "input -> conv1"
    assert words["layer1.0.bn2"] == "relu(layer1.0.bn1) -> layer1.0.conv2"
    assert words["layer1.1.bn1"] == "relu(layer1.0.bn2 + max_pool(relu(bn1))) -> layer1.1.conv1"
    assert words["layer2.0.downsample.1"].endswith("-> layer2.0.downsample.0")
    assert len(words) == 20


@pytest.mark.parametrize("variant", [{}, {"message": "raw"}, {"transition": "learned"}], ids=str)
def test_resnet18_takes_a_training_step(variant: dict[str, Any]) -> None:
    model, images = built("resnet18")
    converted = convert(model, images[:1], **variant)
    converted(images[:3, :, :32, :32]).square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in converted.parameters())
    assert all(b.isfinite().all() for b in converted.buffers())


def test_timm_layers_with_activations_are_converted() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("efficientnet_lite0", num_classes=4).train()
    x = torch.randn(2, 3, 32, 32)
    plain = copy.deepcopy(model).eval()(x)
    converted = convert(model, x)
    reports = conversion_report(converted)
    assert sum(r.prior is None for r in reports) == 1
    torch.testing.assert_close(converted.eval()(x), plain, rtol=1e-4, atol=1e-5)
    converted.train()(x).sum().backward()
