"""Priors that begin at the population statistics of a pretrained model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bkn_core as bkn
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.priors.hooks import find_hooks


def pretrained() -> tuple[nn.Module, Tensor]:
    """A network with the cumulative statistics of its images, and the images."""
    images = torch.randn(64, 3, 8, 8) * 2 + 1
    blocks: list[nn.Module] = []
    for channels in (3, 6, 6):
        blocks += [nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6, momentum=None), nn.ReLU()]
    model = nn.Sequential(*blocks)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    model(images)
    return model, images


@pytest.mark.parametrize(
    "options", [{}, {"correction": True}, {"innovation": False, "correction": True}, {"message": "raw"}], ids=str
)
def test_a_calibrated_prior_is_the_population_statistics(options: dict[str, str | bool]) -> None:
    model, images = pretrained()
    model = bkn.convert(model, images, input_prior=images, **options)  # type: ignore[arg-type]
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BatchKalmanNorm)}
    for layer in layers.values():
        if layer.innovation is not None:
            layer.innovation.normal_()
    bkn.calibrate_priors_(model)
    for row in bkn.prior_quality(model, images):
        assert row.refined is not None and row.refined.mean_error < 1e-3
        assert abs(row.refined.log_variance_ratio) < 1e-2 and row.refined.spread < 1e-2
    if "message" not in options:
        for name, prior in find_hooks(model)[1].priors(model).items():
            torch.testing.assert_close(prior.mean, layers[name].running_mean, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(prior.variance, layers[name].running_var, rtol=1e-4, atol=1e-4)


def test_a_calibrated_model_begins_where_the_pretrained_one_stands() -> None:
    model, images = pretrained()
    expected = model.eval()(images)
    converted = bkn.convert(model, images, gain=0.0, learn_gain=False, input_prior=images).eval()
    with bkn.statistics(converted, "batch"):
        away = (converted(images) - expected).abs().max()
        bkn.calibrate_priors_(converted)
        torch.testing.assert_close(converted(images), expected, rtol=1e-3, atol=1e-3)
    assert away > 0.3


def test_what_cannot_be_calibrated_is_refused() -> None:
    model, images = pretrained()
    with pytest.raises(bkn.BknError, match="1 has nothing to calibrate"):
        bkn.calibrate_priors_(bkn.convert(model, images, innovation=False, input_prior=images))
    model[1].running_mean = model[1].running_var = None
    model[1].track_running_stats = False
    with pytest.raises(bkn.BknError, match="1 keeps no population statistics"):
        bkn.calibrate_priors_(bkn.convert(model, images, input_prior=images))
    with pytest.raises(bkn.BknError, match="not converted"):
        bkn.calibrate_priors_(model)
