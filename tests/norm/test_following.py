"""The gradients of the innovations, weighted by the sensitivity: the fused node against plain functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bkn_core.norm.following import IMAGES, Sensitivity, follow, weight_of
from bkn_core.norm.fused import FilterSettings, kalman_normalize
from bkn_core.norm.kalman import Gaussian, log_innovation, moments, normalize, spread_over_images, update
from bkn_core.norm.layers import BatchKalmanNorm2d

pytestmark = pytest.mark.usefixtures("every_path")
EPS = 1e-3


def leaves(*, images: int, grouped: bool, dtype: torch.dtype, last: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = ((images + 1) // 2, 5) if grouped else (5,)
    x = 2 * draw(images, 5, 4, 3) + 1
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    values = [x, draw(*rows), draw(*rows).square() + 0.3, torch.tensor(0.2).double(), draw(5), draw(5)]
    return [value.to(dtype).requires_grad_() for value in values]


def spread_of(values: list[Tensor]) -> Tensor:
    x, mean, *_ = values
    observed = moments(x, 2)
    return (observed.variance + (observed.mean - mean).square()).mean(0)


def filtered_by_hand(values: list[Tensor], innovations: Tensor | None = None) -> tuple[Tensor, Gaussian]:
    """The plain functions, with v' exp(ι) and µ' + λ sqrt(N + ε) where innovations ι and λ are to be differentiated."""
    x, mean, variance, gain, weight, bias = values
    prior = Gaussian(mean, variance)
    if innovations is not None:
        deviation = (spread_of(values).detach() + EPS).sqrt()
        prior = Gaussian(mean + innovations[1] * deviation, variance * innovations[0].exp())
    posterior = update(prior, moments(x, 2), gain)
    rows = Gaussian(*(spread_over_images(part, len(x), 2) for part in posterior))
    return normalize(x, rows, weight, bias, EPS), posterior


def innovations_of(values: list[Tensor]) -> Tensor:
    x, mean, variance, *_ = values
    observed = moments(x, 2)
    ratio = log_innovation(Gaussian(mean, variance), Gaussian(observed.mean, observed.variance), None, EPS)
    shift = (observed.mean - mean).mean(0) / (spread_of(values).detach() + EPS).sqrt()
    return torch.stack((ratio, shift))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("images", [6, IMAGES])
def test_gradients_are_those_of_the_plain_functions(images: int, grouped: bool, last: bool) -> None:
    types = torch.float32, torch.float64
    narrow, wide = (leaves(images=images, grouped=grouped, dtype=dtype, last=last) for dtype in types)
    upstream = torch.randn(images, 5, 4, 3, dtype=torch.float64)
    used, before = torch.randn(2, 2, 5, dtype=torch.float64)
    constant = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    y, posterior = filtered_by_hand(wide, constant)
    seen, *own = torch.autograd.grad((y * upstream).sum() + posterior.variance.sum(), [constant, *wide])
    after = before + weight_of(images) * (seen - before)
    current = used + weight_of(images) * (seen - used)
    through = torch.autograd.grad(innovations_of(wide), wide[:3], current)
    exact = [a + b for a, b in zip(own, [*through, 0, 0, 0], strict=True)]
    for values in (wide, narrow):
        x, mean, variance, gain, weight, bias = values
        memory = Sensitivity(used.to(x.dtype), before.to(x.dtype, copy=True))
        filtered = kalman_normalize(x, Gaussian(mean, variance), gain, weight, bias, FilterSettings(EPS, 2), memory)
        torch.testing.assert_close(filtered.y.double(), y, rtol=1e-5, atol=1e-5)
        objective = (filtered.y * upstream.to(x.dtype)).sum() + filtered.posterior.variance.sum()
        for actual, wanted in zip(torch.autograd.grad(objective, values), exact, strict=True):
            torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(memory.newest.double(), after, rtol=1e-4, atol=1e-4)


def test_the_plain_form_is_the_same() -> None:
    values = leaves(images=6, grouped=False, dtype=torch.float64, last=False)
    x, mean, variance, gain, weight, bias = values
    fused, plain = (Sensitivity(torch.arange(10.0).double().view(2, 5), torch.ones(2, 5).double()) for _ in range(2))
    y = kalman_normalize(x, Gaussian(mean, variance), gain, weight, bias, FilterSettings(EPS, 2), fused).y
    expected = torch.autograd.grad(y.pow(3).sum(), values)
    observed = moments(x, 2)
    prior = follow(Gaussian(mean, variance), Gaussian(observed.mean, observed.variance), None, EPS, plain, 6)
    y, _ = filtered_by_hand([x, prior.mean, prior.variance, gain, weight, bias])
    for actual, wanted in zip(torch.autograd.grad(y.pow(3).sum(), values), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    torch.testing.assert_close(plain.newest, fused.newest)
    assert torch.equal(fused.used, torch.arange(10.0).double().view(2, 5))


def test_the_loss_does_not_feel_the_scale_of_what_is_observed() -> None:
    """As under batch normalization: ∂L/∂x has no part along x - µ' or 1 if the prior is right (gain 0, ε 0)."""
    x = torch.randn(IMAGES, 3, 5, 5, dtype=torch.float64)
    x = (x - x.mean((0, 2, 3), keepdim=True)).requires_grad_()
    prior, zero = Gaussian(torch.zeros(3).double(), x.detach().var((0, 2, 3), correction=0)), torch.tensor(0.0).double()
    memory = Sensitivity(torch.ones(2, 3).double(), torch.zeros(2, 3).double())
    y = kalman_normalize(x, prior, zero, None, None, FilterSettings(0.0, 2), memory).y
    (gradient,) = torch.autograd.grad(y.pow(3).sum() + y.exp().sum(), x)
    along = (gradient * x.detach()).sum((0, 2, 3))
    torch.testing.assert_close(along, torch.zeros(3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(gradient.sum((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("images", [5, 9])
def test_a_smaller_last_group_counts_by_its_images(images: int) -> None:
    """The innovation is that of the whole forward, in whose N each group weighs as many images as it has."""
    layer = BatchKalmanNorm2d(2, innovation=True, statistics_batch_size=4, gain=0.1, learn_gain=False).double()
    layer.newest_sensitivity.fill_(0.3)  # which the forward takes into use
    x = torch.randn(images, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        x[-1] *= 5
    prior = Gaussian(torch.zeros(2).double(), torch.ones(2).double().requires_grad_())
    observed = moments(x, 4)
    share = observed.count[:, None] / observed.count.sum()
    scale = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    spread = (share * (observed.variance + observed.mean.square())).sum(0).detach()
    deviation = (spread + layer.eps).sqrt()
    moved = Gaussian(prior.mean + scale[1] * deviation, prior.variance * scale[0].exp())
    posterior = update(moved, observed, torch.tensor(0.1).double())
    rows = Gaussian(*(spread_over_images(part, images, 4) for part in posterior))
    loss = normalize(x, rows, layer.weight, layer.bias, layer.eps).pow(3).sum()
    seen, *own = torch.autograd.grad(loss, [scale, x, prior.variance], retain_graph=True)
    ratio = log_innovation(prior, Gaussian(observed.mean, observed.variance), share, layer.eps)
    ratios = torch.stack((ratio, (share * observed.mean).sum(0) / deviation))
    through = torch.autograd.grad(ratios, [x, prior.variance], 0.3 + weight_of(images) * (seen - 0.3))
    actual = torch.autograd.grad(layer(x, prior).pow(3).sum(), [x, prior.variance])
    for gradient, first, second in zip(actual, own, through, strict=True):
        torch.testing.assert_close(gradient, first + second)


def test_what_overflowed_is_not_remembered() -> None:
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    memory = Sensitivity(torch.zeros(2, 3), torch.arange(3.0).repeat(2, 1))
    prior = Gaussian(torch.zeros(3), torch.ones(3))
    y = kalman_normalize(x, prior, torch.tensor(0.1), None, None, FilterSettings(EPS, 2), memory).y
    y[:, 1].mul(torch.inf).sum().backward()
    assert memory.newest[0, 1] == memory.newest[1, 1] == 1
    assert memory.newest[0, 2] != 2 != memory.newest[1, 2]


@pytest.mark.parametrize("training", [True, False])
def test_training_remembers_and_the_next_forward_uses_it(training: bool) -> None:
    layer = BatchKalmanNorm2d(3, innovation=True, statistics_batch_size=2, track_running_stats=False).train(training)
    x, prior = torch.randn(4, 3, 5, 5, requires_grad=True), Gaussian(torch.zeros(3), torch.ones(3))
    layer(x, prior).pow(3).sum().backward()
    assert bool(layer.newest_sensitivity.any()) is training and not layer.sensitivity.any()
    layer(x, prior)
    assert torch.equal(layer.sensitivity, layer.newest_sensitivity)


def test_sensitivities_that_the_kernels_cannot_take_go_through_pytorch() -> None:
    x, prior = torch.randn(4, 4, 5, 5, requires_grad=True), Gaussian(torch.zeros(4), torch.ones(4))
    found = []
    for newest in (torch.zeros(2, 8)[:, ::2], torch.zeros(2, 4)):
        memory = Sensitivity(torch.ones(2, 4), newest)
        y = kalman_normalize(x, prior, torch.tensor(0.1), None, None, FilterSettings(EPS, 2), memory).y
        found.append((torch.autograd.grad(y.pow(3).sum(), x)[0], memory.newest.clone()))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
