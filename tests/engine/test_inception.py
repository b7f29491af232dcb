"""Inception with Batch Normalization: the published network's sizes, and every kind of normalization in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bkn_core.convert import conversion_report, convert
from bkn_core.engine.inception import InceptionV2
from bkn_core.engine.models import build_network, count_parameters, example_images, is_builtin
from bkn_core.kinds import KINDS

# Channels and rows of each module's output for images of 224×224: arXiv 1502.03167, figure 5, its branches added up.
OUTPUTS = {
    "3a": (256, 28),
    "3b": (320, 28),
    "3c": (576, 14),
    "4a": (576, 14),
    "4b": (576, 14),
    "4c": (608, 14),
    "4d": (608, 14),
    "4e": (1056, 7),
    "5a": (1024, 7),
    "5b": (1024, 7),
}


def test_it_has_the_parameters_of_the_published_network() -> None:
    """The authors' release has 11,295,240, where each convolution has a bias that the normalization takes off again."""
    with torch.device("meta"):
        network = InceptionV2(classes=1000)
    biases = sum(m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d))
    assert count_parameters(network) + biases == 11_295_240


def test_its_modules_have_the_outputs_of_the_table() -> None:
    with torch.device("meta"):
        network, images = InceptionV2(), torch.empty(1, 3, 224, 224)
    found: dict[str, tuple[int, ...]] = {}

    def remember(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, __, output: found.update({name: tuple(output.shape)})

    for name in OUTPUTS:
        network.get_submodule(f"inception_{name}").register_forward_hook(remember(name))
    assert network(images).shape == (1, 1000)
    assert found == {name: (1, channels, rows, rows) for name, (channels, rows) in OUTPUTS.items()}


def test_it_is_known_by_name_and_takes_images_of_any_colour() -> None:
    assert is_builtin("inception_v2")
    with torch.device("meta"):
        assert build_network("inception_v2", classes=7, channels=1)(torch.empty(2, 1, 33, 40)).shape == (2, 7)


def test_every_layer_has_a_prior_through_branches_and_pools() -> None:
    images = example_images(3, (32, 32))
    network = build_network("inception_v2", classes=5)
    with torch.no_grad():
        model = convert(network, images, statistics_batch_size=1, input_prior=images)
    reports = conversion_report(model)
    assert len(reports) == 69 and [report.reason for report in reports if report.prior is None] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inception_v2", "resnet50", "resnet101"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reaches_every_parameter(kind: str, name: str) -> None:
    images = example_images(3, (64, 64), images=4)
    model = convert(
        build_network(name, classes=5), images, kind=kind, statistics_batch_size=2, input_prior=images
    ).train()
    logits = model(images)
    logits.logsumexp(1).sum().backward()
    assert logits.shape == (4, 5) and logits.isfinite().all()
    unreached = [
        key for key, value in model.named_parameters() if value.grad is None or not value.grad.isfinite().all()
    ]
    assert unreached == []
