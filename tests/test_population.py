"""Which statistics normalize, and their re-estimation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bkn_core.convert import convert
from bkn_core.errors import ConversionError
from bkn_core.filter.kalman import Gaussian
from bkn_core.layers.batch_kalman import BatchKalmanNorm, BatchKalmanNorm2d
from bkn_core.layers.forward import Forward
from bkn_core.population import Part, estimate_population, mixed_statistics, statistics

VARIANTS: list[dict[str, Any]] = [{}, {"message": "raw"}, {"transition": "learned"}]


def converted(options: dict[str, Any], images: Tensor) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (3, 4):
        layers += [nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    return convert(nn.Sequential(*layers), images, input_prior=images, gain=0.3, **options)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_batch_statistics_of_one_image_do_not_hear_the_neighbours(options: dict[str, Any]) -> None:
    images = torch.randn(5, 3, 6, 6)
    model = converted(options, images).eval()
    state = {n: b.clone() for n, b in model.state_dict().items()}
    with statistics(model, "batch"), torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(model.state_dict()[n], b) for n, b in state.items())
    assert not torch.allclose(together, model(images), atol=1e-3)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_batch_statistics_in_training_size_equal_training(options: dict[str, Any]) -> None:
    images = torch.randn(6, 3, 6, 6)
    model = converted(options, images).eval()
    with statistics(model, "batch", 2):
        y = model(images)
    torch.testing.assert_close(y, model.train()(images))


def test_population_statistics_normalize_a_training_model_without_tracking() -> None:
    images = torch.randn(6, 3, 6, 6)
    model = converted({}, images).train()
    model(images)
    count = int(model[1].num_batches_tracked)
    expected = model.eval()(images)
    model.train()
    with statistics(model, "population"):
        torch.testing.assert_close(model(images), expected)
    assert int(model[1].num_batches_tracked) == count and model[1].training
    with statistics(model, "batch", None):
        model(images)
    assert int(model[1].num_batches_tracked) == count, "nothing is tracked inside"


def test_contexts_nest_and_end_after_an_exception() -> None:
    images = torch.randn(6, 3, 6, 6)
    model = converted({}, images).eval()
    with statistics(model, "batch"):
        with pytest.raises(KeyError), statistics(model, "population"):
            raise KeyError
        assert model[1].statistics == ("batch", 1)
    assert model[1].statistics is None
    with pytest.raises(ConversionError, match="'moving'"), statistics(model, "moving"):  # type: ignore[arg-type]
        pass


PARTS: tuple[Part, ...] = ("population", "group")


@pytest.mark.parametrize("gain", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("mean", "variance"), [(mean, variance) for mean in PARTS for variance in PARTS])
def test_mean_and_variance_come_each_from_where_they_are_wanted(mean: Part, variance: Part, gain: float) -> None:
    layer = BatchKalmanNorm2d(3, gain=gain, learn_gain=False, statistics_batch_size=2).double().eval()
    layer.expects_prior = True
    moving = {"mean": np.array([3.0, -1.0, 0.5]), "var": np.array([0.3, 4.0, 1.0])}
    for name, values in (
        *((f"running_{k}", v) for k, v in moving.items()),
        ("weight", [2, 1, -1]),
        ("bias", [0, 1, 2]),
    ):
        layer.state_dict()[name].copy_(torch.tensor(values))
    prior = Gaussian(torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([0.5, 1.0, 2.0]).double())
    layer.enter(Forward({"norm": prior}, {"norm": layer.gain}), "norm")
    gain = float(layer.gain)
    images = torch.randn(5, 3, 4, 4, dtype=torch.float64) + 1
    with mixed_statistics(layer, mean, variance, 2), torch.no_grad():
        found = layer(images)
    expected = []
    for group in images.split(2):  # the last holds one image
        x = group.numpy()
        d = x.mean((0, 2, 3)) - prior.mean.numpy()
        v = (1 - gain) * prior.variance.numpy() + gain * x.var((0, 2, 3)) + gain * (1 - gain) * d**2
        m = moving["mean"] if mean == "population" else prior.mean.numpy() + gain * d
        v = moving["var"] if variance == "population" else v
        y = (x - m[:, None, None]) / np.sqrt(v + layer.eps)[:, None, None]
        expected.append(y * np.array([2, 1, -1])[:, None, None] + np.array([0, 1, 2])[:, None, None])
    np.testing.assert_allclose(found.numpy(), np.concatenate(expected))
    assert layer.statistics is None and layer.on_posterior is None and not layer._forward_hooks


@pytest.mark.parametrize("options", [*VARIANTS, {"transition": "learned", "covariance": "full"}], ids=str)
def test_two_parts_of_one_kind_are_that_kind(options: dict[str, Any]) -> None:
    images = torch.randn(6, 3, 6, 6)
    model = converted(options, images).train()
    model(images)
    model.eval()
    with torch.no_grad():
        for part, kind in (("population", "population"), ("group", "batch")):
            with mixed_statistics(model, part, part, 2):
                mixed = model(images)
            with statistics(model, kind, 2):
                assert torch.equal(mixed, model(images))
        with mixed_statistics(model, "group", "population", 2):
            assert not torch.allclose(model(images), mixed, atol=1e-2)


def test_estimate_is_the_average_posterior() -> None:
    layer = BatchKalmanNorm2d(3, gain=0.4, statistics_batch_size=2).double()
    layer.expects_prior = True
    prior = Gaussian(torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([0.5, 1.0, 2.0]).double())
    layer.enter(Forward({"norm": prior}, {"norm": layer.gain}), "norm")
    batches = [torch.randn(n, 3, 4, 4, dtype=torch.float64) + n for n in (4, 3)]
    estimate_population(layer, batches)
    mean, variance, gain = np.zeros(3), np.zeros(3), float(layer.gain.detach())
    for batch in batches:
        for group in batch.split(2):
            x = group.numpy()
            d = x.mean((0, 2, 3)) - prior.mean.numpy()
            s = x.var((0, 2, 3), ddof=1)
            mean += len(x) / 7 * (prior.mean.numpy() + gain * d)
            posterior = (1 - gain) * prior.variance.numpy() + gain * s + gain * (1 - gain) * d**2
            variance += len(x) / 7 * posterior
    np.testing.assert_allclose(layer.running_mean.numpy(), mean)
    np.testing.assert_allclose(layer.running_var.numpy(), variance)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_estimating_leaves_weights_flags_and_innovation(options: dict[str, Any]) -> None:
    images = torch.randn(8, 3, 6, 6)
    model = converted(options, images).train()
    model[1].eval()
    state = {n: b.clone() for n, b in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    estimate_population(model, images.split(4))
    assert [m.training for m in model.modules()] == flags
    changed = {n.rsplit(".")[-1] for n, b in model.state_dict().items() if not torch.equal(b, state[n])}
    assert changed == {"running_mean", "running_var"}
    layers = [m for m in model.modules() if isinstance(m, BatchKalmanNorm)]
    assert all(layer.statistics is None and layer.on_posterior is None for layer in layers)
    assert not any(p.grad is not None for p in model.parameters())


def test_estimating_from_nothing_is_refused_and_changes_nothing() -> None:
    images = torch.randn(4, 3, 6, 6)
    model = converted({}, images)
    model(images)
    before = model[1].running_mean.clone()
    with pytest.raises(ConversionError, match="no image"):
        estimate_population(model, [])
    assert torch.equal(model[1].running_mean, before)


def test_estimate_at_gain_one_equals_the_cumulative_average_of_batch_norm() -> None:
    batches = [torch.randn(4, 3, 5, 5) for _ in range(3)]
    layer, reference = BatchKalmanNorm2d(3, gain=1.0, learn_gain=False), nn.BatchNorm2d(3, momentum=None)
    estimate_population(layer, batches)
    for batch in batches:
        reference(batch)
    torch.testing.assert_close(layer.running_mean, reference.running_mean)
    torch.testing.assert_close(layer.running_var, reference.running_var)
