"""The layers against `torch.nn`'s batch normalization, and what they add to it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import kalman_loops
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bkn_core.errors import StatisticsError
from bkn_core.filter.kalman import Gaussian
from bkn_core.layers.batch_kalman import (
    BatchKalmanNorm,
    BatchKalmanNorm1d,
    BatchKalmanNorm2d,
    BatchKalmanNorm3d,
)
from bkn_core.layers.forward import Forward

KINDS: list[tuple[type[nn.Module], type[BatchKalmanNorm], tuple[int, ...]]] = [
    (nn.BatchNorm1d, BatchKalmanNorm1d, (6, 5)),
    (nn.BatchNorm1d, BatchKalmanNorm1d, (6, 5, 4)),
    (nn.BatchNorm2d, BatchKalmanNorm2d, (4, 5, 3, 6)),
    (nn.BatchNorm3d, BatchKalmanNorm3d, (2, 5, 3, 2, 4)),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": None},
    {"momentum": 0.5, "eps": 1e-2},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]


def drawn_affine(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        if parameter.dim():
            nn.init.normal_(parameter, 1.0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("theirs", "ours", "shape"), KINDS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_gain_one_is_batch_norm(
    theirs: type[nn.Module], ours: type[BatchKalmanNorm], shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    reference, layer = theirs(5, **options), ours(5, **options, gain=1.0, learn_gain=False)
    drawn_affine(reference)
    layer.load_state_dict(reference.state_dict(), strict=False)
    for step in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step)) * 2 + 1
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        upstream = torch.randn(shape, generator=torch.Generator().manual_seed(9))
        y, expected = layer(mine), reference(other)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        y.backward(upstream), expected.backward(upstream)
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(layer.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), buffer, rtol=1e-5, atol=1e-6)
    x = torch.randn(shape)
    torch.testing.assert_close(layer.eval()(x), reference.eval()(x), rtol=1e-5, atol=1e-5)


def test_prior_does_not_matter_at_gain_one() -> None:
    x = torch.randn(4, 5, 3, 3)
    layer = BatchKalmanNorm2d(5, gain=1.0, learn_gain=False)
    reference = nn.BatchNorm2d(5)
    y = layer(x, Gaussian(torch.randn(5), torch.rand(5)))
    torch.testing.assert_close(y, reference(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var, reference.running_var)


def test_twenty_training_steps_track_batch_norm() -> None:
    def network(norm: Any) -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            norm(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            norm(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 4),
        )

    models = network(nn.BatchNorm2d), network(lambda c: BatchKalmanNorm2d(c, gain=1.0, learn_gain=False))
    images, labels = torch.randn(20, 16, 3, 8, 8), torch.randint(4, (20, 16))
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for x, label in zip(images, labels, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), label).backward()
            optimizer.step()
    reference, state = models[0].state_dict(), models[1].state_dict()
    for name, value in reference.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-4)
    assert (reference["0.weight"] - network(nn.BatchNorm2d)[0].weight).abs().max() > 1e-2


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=str)
def test_groups_equal_a_loop_of_batch_norm_over_chunks(size: int, options: dict[str, Any]) -> None:
    x = torch.randn(7, 5, 3, 3, requires_grad=True)
    layer = BatchKalmanNorm2d(5, statistics_batch_size=size, **options)
    drawn_affine(layer)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), x)
    parts, means, variances = [], [], []
    for chunk in x.split(size):
        reference = nn.BatchNorm2d(5, momentum=1.0)
        reference.load_state_dict({"weight": weight, "bias": bias}, strict=False)
        parts.append(reference(chunk))
        means.append(len(chunk) / 7 * reference.running_mean)
        variances.append(len(chunk) / 7 * reference.running_var)
    expected = torch.cat(parts)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    (wanted,) = torch.autograd.grad(expected.pow(3).sum(), x)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)
    rate = options.get("momentum", 0.1) or 1.0
    torch.testing.assert_close(layer.running_mean, rate * torch.stack(means).sum(0))
    torch.testing.assert_close(layer.running_var, (1 - rate) + rate * torch.stack(variances).sum(0))


def test_moving_statistics_average_the_posterior() -> None:
    layer = BatchKalmanNorm2d(3, statistics_batch_size=2, gain=0.3).double()
    mean, variance = np.zeros(3), np.ones(3)
    prior_mean, prior_variance = np.array([0.1, -0.2, 0.3]), np.array([0.5, 1.0, 2.0])
    prior = Gaussian(torch.tensor(prior_mean), torch.tensor(prior_variance))
    gain = float(layer.gain.detach())
    for step in range(4):
        x = torch.randn(5, 3, 2, 2, dtype=torch.float64) + step
        layer(x, prior)
        observed, covariance, count = kalman_loops.observe(x.numpy(), 2)
        posterior_mean, posterior_variance = np.zeros(3), np.zeros(3)
        for g, images in enumerate([2, 2, 1]):
            unbiased = np.diag(covariance[g]) * count[g] / (count[g] - 1)
            d = observed[g] - prior_mean
            posterior_mean += images / 5 * (prior_mean + gain * d)
            posterior_variance += (
                images / 5 * ((1 - gain) * prior_variance + gain * unbiased + gain * (1 - gain) * d**2)
            )
        mean, variance = 0.9 * mean + 0.1 * posterior_mean, 0.9 * variance + 0.1 * posterior_variance
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-6)
    np.testing.assert_allclose(layer.running_var.numpy(), variance, rtol=1e-6)
    assert int(layer.num_batches_tracked) == 4


def test_one_value_per_channel_needs_a_prior() -> None:
    for shape, size in [((1, 4), None), ((3, 4, 1, 1), 1), ((3, 4, 1, 1), 2)]:
        layer = (BatchKalmanNorm1d if len(shape) == 2 else BatchKalmanNorm2d)(4, statistics_batch_size=size)
        with pytest.raises(StatisticsError, match=r"group of shape \(1, 4.*one value per channel"):
            layer(torch.randn(shape))
        assert int(layer.num_batches_tracked) == 0
        prior = Gaussian(torch.zeros(4), torch.ones(4))
        x = torch.randn(shape)
        y = layer(x, prior)
        assert y.isfinite().all()
        assert not torch.allclose(y, torch.zeros(()))
        assert layer.running_var.isfinite().all()


def test_guard_leaves_a_single_value_something_to_say() -> None:
    layer = BatchKalmanNorm1d(4, statistics_batch_size=1, guarded=True)
    y = layer(torch.randn(3, 4), Gaussian(torch.zeros(4), torch.ones(4)))
    assert y.abs().max() > 0.1  # a variance of 0 from one value is no evidence against the prior


def test_state_dict_holds_all_names_of_batch_norm() -> None:
    layer = BatchKalmanNorm2d(4, correction=True, innovation=True)
    reference = nn.BatchNorm2d(4)
    drawn_affine(reference)
    assert set(reference.state_dict()) < set(layer.state_dict())
    missing = layer.load_state_dict(reference.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert torch.equal(layer.weight, reference.weight)
    for name in ("gain_logit", "gain_factor", "prior_offset", "prior_log_scale", "innovation"):
        assert name in layer.state_dict()


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "state_dict"])
def test_layer_with_a_prior_of_a_forward_survives(through: str) -> None:
    layer = BatchKalmanNorm2d(4, gain=0.3, correction=True, innovation=True, statistics_batch_size=2)
    prior = Gaussian(layer.bias * 2, layer.weight.square())  # tensors of a graph, which cannot be copied
    forward = Forward({"norm": prior}, {"norm": layer.gain})
    layer.enter(forward, "norm")
    layer(torch.randn(4, 4, 3, 3))
    forward.is_open = False
    if through == "state_dict":
        other = BatchKalmanNorm2d(4, gain=0.9, correction=True, innovation=True, statistics_batch_size=2)
        other.load_state_dict(layer.state_dict())
    else:
        other = copy.deepcopy(layer) if through == "deepcopy" else pickle.loads(pickle.dumps(layer))
        assert other.context is None and other.slots.own.forward is None
    x, prior = torch.randn(4, 4, 3, 3), Gaussian(torch.zeros(4), torch.ones(4))
    assert torch.equal(other(x, prior), layer(x, prior))
    for name, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_model_trains(dtype: torch.dtype) -> None:
    layer = BatchKalmanNorm2d(4, correction=True, innovation=True, statistics_batch_size=2).to(dtype)
    nn.BatchNorm2d(4).to(dtype)(torch.randn(4, 4, 6, 6).to(dtype))  # as batch normalization does
    prior = Gaussian(torch.zeros(4), torch.ones(4))
    y = layer(torch.randn(4, 4, 6, 6).to(dtype), prior)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()


def test_half_precision_activations_meet_float32_parameters() -> None:
    layer, reference = BatchKalmanNorm2d(4, gain=1.0, learn_gain=False), nn.BatchNorm2d(4)
    x = torch.randn(4, 4, 6, 6).bfloat16()
    for module in (layer.train(), layer.eval()):
        torch.testing.assert_close(module(x), reference.train(module.training)(x), rtol=1e-2, atol=1e-2)
        assert module(x).dtype == torch.bfloat16


def test_empty_batch_is_refused_in_words_or_normalized() -> None:
    layer = BatchKalmanNorm2d(4)
    assert nn.BatchNorm2d(4)(torch.empty(0, 4, 3, 3)).shape == (0, 4, 3, 3)
    try:
        y = layer(torch.empty(0, 4, 3, 3))
    except StatisticsError:
        return
    assert y.shape == (0, 4, 3, 3)
    assert layer.running_mean.isfinite().all()


def test_same_seed_same_bits() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(5)
        layer = BatchKalmanNorm2d(4, gain=0.2, statistics_batch_size=2, correction=True, innovation=True)
        x = torch.randn(7, 4, 9, 9, requires_grad=True)
        layer(x, Gaussian(torch.zeros(4), torch.ones(4))).square().sum().backward()
        return [x.grad, layer.gain_logit.grad, *layer.state_dict().values()]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_the_printed_form_names_the_settings() -> None:
    text = repr(BatchKalmanNorm2d(3, statistics_batch_size=2, gain=0.25))
    assert "statistics_batch_size=2" in text and "gain=0.25" in text
