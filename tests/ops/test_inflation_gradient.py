"""The gradients of the inflations, weighted by the sensitivity: the fused node against plain functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bkn_core.filter.inflation_gradient import FEW, LARGEST_RATIO, MANY, USUAL, WEIGHT, Sensitivity, follow
from bkn_core.filter.kalman import Gaussian, Groups, moments, normalize, update
from bkn_core.layers.batch_kalman import BatchKalmanNorm2d
from bkn_core.ops.normalize import FilterSettings, kalman_normalize

pytestmark = pytest.mark.usefixtures("every_path")
EPS = 1e-3


def used_by_hand(running: Tensor, seen: Tensor, images: int) -> Tensor:
    """What a channel uses: its running sensitivity, moved towards the usual distance of its own by many images."""
    part = 0.0 if images <= FEW else 1.0 if images >= MANY else (images - FEW) / (MANY - FEW)
    used = running.clone()
    for kind, row in enumerate(running):
        usual = USUAL * (sum(float(value) ** 2 for value in row) / len(row)) ** 0.5
        for channel, value in enumerate(row):
            surplus = float(seen[kind, channel] - value)
            if abs(surplus) > usual:
                used[kind, channel] += part * (abs(surplus) - usual) * (1 if surplus > 0 else -1)
    return used


def leaves(*, images: int, grouped: bool, dtype: torch.dtype, last: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = ((images + 1) // 2, 5) if grouped else (5,)
    x = 2 * draw(images, 5, 4, 3) + 1
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    values = [x, draw(*rows), draw(*rows).square() + 0.3, torch.tensor(0.2).double(), draw(5), draw(5)]
    return [value.to(dtype).requires_grad_() for value in values]


def rows_of(mean: Tensor, x: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """N_g and m, and the share of each group."""
    observed = moments(x, size)
    share = observed.count[:, None] / observed.count.sum()
    rows = observed.variance + (observed.mean - mean).square()
    return rows, (share * (observed.mean - mean)).sum(0), share


def inflations_of(x: Tensor, mean: Tensor, variance: Tensor, size: int = 2, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """The mean of N_g / v' and m / d, the second of them only for its gradient by m; and d."""
    rows, shift, share = rows_of(mean, x, size)
    scale = ((share * variance).sum(0) if variance.dim() > 1 else variance) + eps
    ratios = rows / scale
    bounded = torch.where(ratios > LARGEST_RATIO, LARGEST_RATIO * (1 + (ratios / LARGEST_RATIO).log()), ratios)
    deviation = torch.maximum(scale, ((share * rows).sum(0) + eps) / LARGEST_RATIO).sqrt().detach()
    return torch.stack(((share * bounded).sum(0) + eps / scale, shift / deviation)), deviation


def filtered_by_hand(values: list[Tensor], inflations: Tensor | None = None) -> tuple[Tensor, Gaussian]:
    """The plain functions, with v' exp(ι) and µ' + λ d where inflations ι and λ are to be differentiated."""
    x, mean, variance, gain, weight, bias = values
    prior = Gaussian(mean, variance)
    if inflations is not None:
        deviation = inflations_of(x, mean, variance)[1]
        prior = Gaussian(mean + inflations[1] * deviation, variance * inflations[0].exp())
    posterior = update(prior, moments(x, 2), gain)
    rows = Gaussian(*(Groups.of(len(x), 2).spread(part) for part in posterior))
    return normalize(x, rows, weight, bias, EPS), posterior


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("images", "stretch"), [(6, 1), (80, 1), (160, 1), (6, 5)])
def test_gradients_are_those_of_the_plain_functions(images: int, stretch: float, grouped: bool, last: bool) -> None:
    types = torch.float32, torch.float64
    narrow, wide = (leaves(images=images, grouped=grouped, dtype=dtype, last=last) for dtype in types)
    with torch.no_grad():
        for values in (narrow, wide):
            values[0] *= stretch  # beyond the largest ratio
    upstream = torch.randn(images, 5, 4, 3, dtype=torch.float64)
    running, before = 0.2 * torch.randn(2, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    constant = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    y, posterior = filtered_by_hand(wide, constant)
    seen, *own = torch.autograd.grad((y * upstream).sum() + posterior.variance.sum(), [constant, *wide])
    after = before + torch.cat((seen, torch.ones(1, 5)))
    used = used_by_hand(running, seen, images)
    assert bool((used != running).any()) is (images > FEW)  # some are beyond the usual
    through = torch.autograd.grad(inflations_of(*wide[:3])[0], wide[:3], used)
    exact = [a + b for a, b in zip(own, [*through, 0, 0, 0], strict=True)]
    for values in (wide, narrow):
        x, mean, variance, gain, weight, bias = values
        memory = Sensitivity(running.to(x.dtype), before.to(x.dtype, copy=True))
        filtered = kalman_normalize(x, Gaussian(mean, variance), gain, weight, bias, FilterSettings(EPS, 2), memory)
        torch.testing.assert_close(filtered.y.double(), y, rtol=1e-5, atol=1e-5)
        objective = (filtered.y * upstream.to(x.dtype)).sum() + filtered.posterior.variance.sum()
        for actual, wanted in zip(torch.autograd.grad(objective, values), exact, strict=True):
            torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-4 * stretch)
        torch.testing.assert_close(memory.gathered.double(), after, rtol=1e-4, atol=1e-4)
        assert torch.equal(memory.used, running.to(x.dtype))


def test_the_plain_form_is_the_same() -> None:
    values = leaves(images=6, grouped=False, dtype=torch.float64, last=False)
    x, mean, variance, gain, weight, bias = values
    fused, plain = (Sensitivity(torch.arange(10.0).double().view(2, 5), torch.ones(3, 5).double()) for _ in range(2))
    y = kalman_normalize(x, Gaussian(mean, variance), gain, weight, bias, FilterSettings(EPS, 2), fused).y
    expected = torch.autograd.grad(y.pow(3).sum(), values)
    observed = moments(x, 2)
    prior = follow(Gaussian(mean, variance), Gaussian(observed.mean, observed.variance), None, EPS, plain, 6)
    y, _ = filtered_by_hand([x, prior.mean, prior.variance, gain, weight, bias])
    for actual, wanted in zip(torch.autograd.grad(y.pow(3).sum(), values), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    torch.testing.assert_close(plain.gathered, fused.gathered)
    assert torch.equal(fused.used, torch.arange(10.0).double().view(2, 5))


def test_the_loss_does_not_feel_the_scale_of_what_is_observed() -> None:
    """As under batch normalization: ∂L/∂x has no part along x - µ' or 1 if the prior is right and h̄ is h (ε 0)."""
    x = torch.randn(128, 3, 5, 5, dtype=torch.float64)
    x = (x - x.mean((0, 2, 3), keepdim=True)).requires_grad_()
    prior, zero = Gaussian(torch.zeros(3).double(), x.detach().var((0, 2, 3), correction=0)), torch.tensor(0.0).double()
    gradients, used = [], torch.zeros(2, 3).double()
    for _ in range(2):
        memory = Sensitivity(used, torch.zeros(3, 3).double())
        y = kalman_normalize(x, prior, zero, None, None, FilterSettings(0.0, 2), memory).y
        gradients += torch.autograd.grad(y.pow(3).sum() + y.exp().sum(), x)
        used = memory.gathered[:2]
    along = (gradients[1] * x.detach()).sum((0, 2, 3))
    torch.testing.assert_close(along, torch.zeros(3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(gradients[1].sum((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-9)
    assert (gradients[0] * x.detach()).sum((0, 2, 3)).abs().min() > 1


@pytest.mark.parametrize("images", [5, 9])
def test_a_smaller_last_group_counts_by_its_images(images: int) -> None:
    """The inflation is that of the whole forward, in whose N each group weighs as many images as it has."""
    layer = BatchKalmanNorm2d(2, innovation=True, statistics_batch_size=4, gain=0.1, learn_gain=False).double()
    layer.sensitivity.fill_(0.3)
    x = torch.randn(images, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        x[-1] *= 5
    prior = Gaussian(torch.zeros(2).double(), torch.ones(2).double().requires_grad_())
    posterior = update(prior, moments(x, 4), torch.tensor(0.1).double())
    rows = Gaussian(*(Groups.of(images, 4).spread(part) for part in posterior))
    loss = normalize(x, rows, layer.weight, layer.bias, layer.eps).pow(3).sum()
    ratios = inflations_of(x, *prior, 4, layer.eps)[0]
    expected = torch.autograd.grad(
        [loss, ratios], [x, prior.variance], [torch.ones_like(loss), torch.full((2, 2), 0.3)]
    )
    actual = torch.autograd.grad(layer(x, prior).pow(3).sum(), [x, prior.variance])
    for gradient, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_what_overflowed_is_not_remembered() -> None:
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    memory = Sensitivity(torch.zeros(2, 3), torch.arange(3.0).repeat(3, 1))
    prior = Gaussian(torch.zeros(3), torch.ones(3))
    y = kalman_normalize(x, prior, torch.tensor(0.1), None, None, FilterSettings(EPS, 2), memory).y
    y[:, 1].mul(torch.inf).sum().backward()
    assert (memory.gathered[:, 1] == 1).all()
    assert memory.gathered[:, 2].tolist() == [2, 2, 3]  # of which the loss says nothing


@pytest.mark.parametrize("training", [True, False])
def test_training_gathers_and_the_next_forward_remembers(training: bool) -> None:
    layer = BatchKalmanNorm2d(3, innovation=True, statistics_batch_size=2, track_running_stats=False).train(training)
    x, prior = torch.randn(4, 3, 5, 5, requires_grad=True), Gaussian(torch.zeros(3), torch.ones(3))
    for scale in (1, 3):  # two passes without a forward between
        loss = layer(x, prior).pow(3).sum()
        loss.backward(retain_graph=True)
        loss.backward(torch.tensor(float(scale)))
        if scale == 1:
            first = layer.gathered_sensitivity.clone()
            assert not layer.sensitivity.any() and bool(first.any()) is training
    layer.sensitivity.zero_()
    found = layer.gathered_sensitivity.clone()
    layer(x, prior)
    if training:
        assert first[2].eq(2).all() and found[2].eq(2).all()
        torch.testing.assert_close(layer.sensitivity, WEIGHT * found[:2] / 2)
        before = layer.sensitivity.clone()
        layer(x, prior)
        assert torch.equal(layer.sensitivity, before)  # nothing was gathered between
    assert not layer.gathered_sensitivity.any()


@pytest.mark.parametrize("size", [1, 2])
def test_the_gradient_does_not_depend_on_how_images_are_split(size: int) -> None:
    generator = torch.Generator().manual_seed(5)
    x, upstream = torch.randn(2, 8, 3, 5, 5, generator=generator, dtype=torch.float64).unbind()
    variance = torch.tensor([0.5, 1, 2]).double()
    found = []
    for parts in (1, 2, 4):
        leaf, scale = x.clone().requires_grad_(), variance.clone().requires_grad_()
        prior, gathered = Gaussian(torch.zeros(3).double(), scale), torch.zeros(3, 3).double()
        for part, above in zip(leaf.chunk(parts), upstream.chunk(parts), strict=True):
            memory = Sensitivity(torch.ones(2, 3).double() / parts, gathered)
            settings = FilterSettings(EPS, size)
            y = kalman_normalize(part, prior, torch.tensor(0.2).double(), None, None, settings, memory).y
            (y * above).sum().backward()
        found.append((leaf.grad, scale.grad, gathered[:2]))
    for other in found[1:]:
        for first, second in zip(found[0], other, strict=True):
            torch.testing.assert_close(first, second)


def test_sensitivities_that_the_kernels_cannot_take_go_through_pytorch() -> None:
    x, prior = torch.randn(4, 4, 5, 5, requires_grad=True), Gaussian(torch.zeros(4), torch.ones(4))
    found = []
    for gathered in (torch.zeros(3, 8)[:, ::2], torch.zeros(3, 4)):
        memory = Sensitivity(torch.ones(2, 4), gathered)
        y = kalman_normalize(x, prior, torch.tensor(0.1), None, None, FilterSettings(EPS, 2), memory).y
        found.append((torch.autograd.grad(y.pow(3).sum(), x)[0], memory.gathered.clone()))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
