"""Normalization of each image by itself, against loops over NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawn_models import drawn_images, drawn_model
from torch import Tensor, nn

from bkn_core.errors import ConversionError
from bkn_core.export.batch_statistics import ImageNorm, with_image_statistics
from bkn_core.filter.kalman import Gaussian
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.population import statistics
from bkn_core.priors.hooks import find_hooks


def drawn_layer(gain: float, channels: int = 5) -> BatchKalmanNorm:
    layer = BatchKalmanNorm(channels, gain=gain, learn_gain=False, eps=1e-3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(channels, generator=generator))
        layer.bias.copy_(torch.randn(channels, generator=generator))
    return layer


def filtered(x: np.ndarray, mean: np.ndarray, variance: np.ndarray, layer: BatchKalmanNorm, gain: float) -> np.ndarray:
    """Equation 7 of the paper, one image and channel at a time."""
    y = np.empty_like(x)
    for image in range(x.shape[0]):
        for channel in range(x.shape[1]):
            values = x[image, channel]
            posterior = (1 - gain) * mean[channel] + gain * values.mean()
            difference = values.mean() - mean[channel]
            spread = (1 - gain) * variance[channel] + gain * values.var() + gain * (1 - gain) * difference**2
            scale = float(layer.weight[channel].detach()) / np.sqrt(spread + layer.eps)
            y[image, channel] = (values - posterior) * scale + float(layer.bias[channel].detach())
    return y


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 7), (3, 5, 4, 6), (2, 5, 3, 2, 4), (3, 5, 1, 1)], ids=str)
@pytest.mark.parametrize("gain", [0.0, 0.1, 0.9])
def test_image_norm_is_the_papers_update(shape: tuple[int, ...], gain: float) -> None:
    generator = np.random.default_rng(4)
    x = generator.standard_normal(shape) * 2 + 1
    mean, variance = generator.standard_normal(5), generator.uniform(0.5, 2, 5)
    layer = drawn_layer(gain)
    module = ImageNorm("norm", layer, Gaussian(torch.from_numpy(mean), torch.from_numpy(variance)))
    found = module(torch.from_numpy(x).float()).numpy()
    np.testing.assert_allclose(found, filtered(x, mean, variance, layer, gain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1e15, 1e18, 5e18])
def test_image_norm_of_large_values_is_the_papers_update(size: float) -> None:
    x = np.random.default_rng(4).standard_normal((2, 5, 40, 30)) * size
    mean, variance = np.full(5, size), np.ones(5)
    layer = drawn_layer(0.1)
    priors = Gaussian(torch.from_numpy(mean), torch.from_numpy(variance))
    module, x = ImageNorm("norm", layer, priors), x.astype(np.float32).astype(np.float64)
    found = module(torch.from_numpy(x).float()).numpy()
    np.testing.assert_allclose(found, filtered(x, mean, variance, layer, 0.1), rtol=1e-5, atol=1e-5)


def test_image_norm_without_a_prior_is_instance_normalization() -> None:
    layer = drawn_layer(0.3)
    x = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(5))
    expected = nn.functional.instance_norm(x, weight=layer.weight, bias=layer.bias, eps=layer.eps)
    torch.testing.assert_close(ImageNorm("norm", layer, None)(x), expected.detach(), rtol=1e-5, atol=1e-5)


def test_image_norm_keeps_small_deviations_from_large_means() -> None:
    generator = torch.Generator().manual_seed(6)
    x = 1e4 + torch.randn(2, 5, 32, 32, generator=generator, dtype=torch.float64)
    layer = drawn_layer(0.3)
    expected = nn.functional.instance_norm(x.float().double(), weight=layer.weight.double(), eps=layer.eps)
    expected = expected + layer.bias.double().view(1, -1, 1, 1)
    found = ImageNorm("norm", layer, None)(x.float())
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-3, atol=1e-3)


def test_one_value_per_channel_without_a_prior_is_refused_by_name() -> None:
    with pytest.raises(ConversionError, match=r"stem\.norm has one value per channel"):
        ImageNorm("stem.norm", drawn_layer(0.3), None)(torch.zeros(4, 5, 1, 1))


def test_priors_become_constants_computed_in_float64() -> None:
    model = drawn_model()
    root, hooks = find_hooks(model.double())
    expected = hooks.priors(root)["bn2"]
    prepared, layers = with_image_statistics(model.float())
    norm = prepared.get_submodule("bn2")
    gain = float(model.get_submodule("bn2").gain.detach())
    assert layers == 2 and isinstance(norm, ImageNorm)
    torch.testing.assert_close(norm.prior_mean, expected.mean.detach().float(), rtol=1e-6, atol=1e-7)
    floor = (1 - gain) * expected.variance.detach() + 1e-5
    torch.testing.assert_close(norm.floor, floor.float(), rtol=1e-6, atol=1e-7)


def test_a_model_inside_another_keeps_its_priors() -> None:
    inner, images = drawn_model(), drawn_images()
    outer = nn.Sequential(nn.Identity(), inner).eval()
    with torch.no_grad(), statistics(outer, "batch", 1):
        expected = outer(images)
    torch.testing.assert_close(with_image_statistics(outer)[0](images), expected, rtol=1e-4, atol=1e-4)


class NormAct(nn.BatchNorm2d):
    """A norm layer that applies its activation itself, as timm's BatchNormAct2d does."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(0.9), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(self.drop(super().forward(x)))
        return result


@pytest.mark.parametrize("options", [{}, {"message": "raw"}, {"transition": "learned"}], ids=str)
def test_the_activation_of_a_fused_layer_is_kept(options: dict[str, str]) -> None:
    fused = nn.Sequential(nn.Conv2d(3, 5, 3), NormAct(5), nn.Conv2d(5, 6, 3), NormAct(6), nn.Conv2d(6, 4, 1))
    model, images = drawn_model(fused, **options), drawn_images()
    with torch.no_grad(), statistics(model, "batch", 1):
        expected = model(images)
    prepared, layers = with_image_statistics(model)
    assert layers == 2
    torch.testing.assert_close(prepared(images), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_used_under_two_names_stays_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), drawn_layer(1.0), nn.Conv2d(5, 5, 1)).eval()
    model.append(model[1])
    prepared, layers = with_image_statistics(model)
    assert layers == 1 and prepared[1] is prepared[3] and isinstance(prepared[1], ImageNorm)


def test_the_model_itself_is_left_alone() -> None:
    model, images = drawn_model(message="raw"), drawn_images()
    before = model(images)
    with_image_statistics(model)
    assert type(model.get_submodule("bn2")).__name__ == "BatchKalmanNorm2d"
    assert torch.equal(model(images), before)
