"""Propagated moments against quadrature (SciPy), Monte-Carlo through the real operations, and exact sums."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor
from torch.nn import functional as F

from bkn_core.filter import propagate, spatial
from bkn_core.filter.kalman import Gaussian

MEANS = [-3.0, -1.0, -0.2, 0.0, 0.4, 1.5, 5.0]
DEVIATIONS = [0.05, 0.5, 1.0, 3.0]


def quadrature(function: Callable[[float], float], mean: float, deviation: float) -> tuple[float, float]:
    """Mean and variance of f(X) by adaptive integration, split at the kinks that the tests use."""

    def integral(g: Callable[[float], float]) -> float:
        low, high = mean - 12 * deviation, mean + 12 * deviation
        edges = sorted({low, high, *(k for k in (-3.0, -1.0, 0.0, 1.0, 3.0, 6.0) if low < k < high), mean})
        density = lambda x: math.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))  # noqa: E731
        parts = itertools.pairwise(edges)
        return sum(integrate.quad(lambda x: g(x) * density(x), a, b, epsabs=1e-13)[0] for a, b in parts)

    expected = integral(function)
    return expected, integral(lambda x: (function(x) - expected) ** 2)


def grid(dtype: torch.dtype = torch.float64) -> Gaussian:
    pairs = [(m, s) for m in MEANS for s in DEVIATIONS]
    return Gaussian(
        torch.tensor([m for m, _ in pairs], dtype=dtype), torch.tensor([s * s for _, s in pairs], dtype=dtype)
    )


def assert_moments(result: Gaussian, function: Callable[[float], float], tolerance: float) -> None:
    expected = [quadrature(function, m, s) for m in MEANS for s in DEVIATIONS]
    means, variances = (np.array(column) for column in zip(*expected, strict=True))
    np.testing.assert_allclose(result.mean.double().numpy(), means, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(result.variance.double().numpy(), variances, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_relu(dtype: torch.dtype, tolerance: float) -> None:
    assert_moments(propagate.relu(grid(dtype)), lambda x: max(x, 0.0), tolerance)


@pytest.mark.parametrize("slope", [0.01, 0.3, 1.0, -0.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_leaky_relu(slope: float, dtype: torch.dtype, tolerance: float) -> None:
    assert_moments(propagate.leaky_relu(grid(dtype), slope), lambda x: x if x > 0 else slope * x, tolerance)


@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-1.0, 1.0), (-3.0, 0.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_clipped(low: float, high: float, dtype: torch.dtype, tolerance: float) -> None:
    assert_moments(propagate.clipped(grid(dtype), low, high), lambda x: min(max(x, low), high), tolerance)


@pytest.mark.parametrize(("low", "high", "value"), [(-1e9, 1.0, -3.0), (-1.0, 1.0, 0.0), (-3.0, 6.0, 2.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 3e-5)])
def test_thresholded(low: float, high: float, value: float, dtype: torch.dtype, tolerance: float) -> None:
    result = propagate.thresholded(grid(dtype), low, high, value)
    assert_moments(result, lambda x: value if low < x < high else x, tolerance)


@pytest.mark.parametrize(
    ("name", "function", "tolerance"),
    [
        ("sigmoid", lambda x: 1 / (1 + math.exp(-x)), 1e-4),
        ("tanh", math.tanh, 0.025),
        ("silu", lambda x: x / (1 + math.exp(-x)), 1e-3),
        ("gelu", lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)), 4e-3),
        ("square", lambda x: x * x, 1e-9),
        ("hardswish", lambda x: x * min(max(x + 3, 0.0), 6.0) / 6, 0.03),
        ("hardsigmoid", lambda x: min(max(x + 3, 0.0), 6.0) / 6, 0.03),
        ("elu", lambda x: x if x > 0 else math.expm1(x), 0.03),
    ],
)
def test_elementwise(name: str, function: Callable[[float], float], tolerance: float) -> None:
    real = getattr(F, name, None) or getattr(torch, name)
    assert_moments(propagate.elementwise(grid(), real), function, tolerance)


def test_float32_loses_no_digits_where_the_mean_is_large() -> None:
    narrow = Gaussian(torch.tensor([-3.0, 8.0, 100.0]), torch.tensor([1.0, 1.0, 1e-4]))
    wide = propagate.relu(Gaussian(*(t.double() for t in narrow)))
    result = propagate.relu(narrow)
    torch.testing.assert_close(result.variance.double(), wide.variance, rtol=1e-4, atol=0)
    torch.testing.assert_close(result.mean.double(), wide.mean, rtol=1e-4, atol=0)


FUNCTIONS: dict[str, Callable[[Gaussian], Gaussian]] = {
    "relu": propagate.relu,
    "leaky": lambda message: propagate.leaky_relu(message, 0.2),
    "clipped": lambda message: propagate.clipped(message, 0.0, 6.0),
    "thresholded": lambda message: propagate.thresholded(message, -1e9, 0.3, -1.0),
    "tanh": lambda message: propagate.elementwise(message, torch.tanh),
    "maximum": lambda message: spatial.maximum(message, torch.tanh, 3.0),
    "normalized": lambda message: spatial.normalized(message, 1, 1e-5, is_pointwise=True),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activation_gradients_equal_finite_differences(name: str) -> None:
    mean = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    variance = (torch.rand(2, 5, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, v: tuple(FUNCTIONS[name](Gaussian(m, v))), (mean, variance))


def test_transposed_convolution_gradients_equal_finite_differences() -> None:
    leaves = [torch.randn(4), torch.rand(4) + 0.1, torch.randn(4, 3, 3, 2), torch.randn(6)]
    leaves = [t.double().requires_grad_() for t in leaves]

    def function(mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        options = {"groups": 2, "stride": (2, 1), "dilation": (1, 2)}
        return tuple(spatial.transposed_convolution(Gaussian(mean, variance), weight, bias, **options))

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("name", ["relu", "leaky", "clipped"])
def test_activation_gradients_of_gradients_are_right(name: str) -> None:
    mean = torch.randn(4, dtype=torch.float64, requires_grad=True)
    variance = (torch.rand(4, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda m, v: tuple(FUNCTIONS[name](Gaussian(m, v))), (mean, variance))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("mean", [-1.0, 0.0, 1.0])
def test_zero_variance_has_finite_gradients(name: str, mean: float) -> None:
    gamma, beta = torch.zeros(3, requires_grad=True), torch.full((3,), mean, requires_grad=True)
    result = FUNCTIONS[name](Gaussian(beta, gamma.square()))
    (result.mean.sum() + result.variance.sum()).backward()
    assert result.mean.isfinite().all() and (result.variance >= 0).all()
    assert gamma.grad is not None and gamma.grad.isfinite().all()
    assert beta.grad is not None and beta.grad.isfinite().all()


def test_leaky_slope_receives_its_gradient() -> None:
    slope = torch.tensor([0.25, 0.1], dtype=torch.float64, requires_grad=True)
    message = Gaussian(torch.tensor([0.3, -0.2]).double(), torch.tensor([1.0, 2.0]).double())
    assert torch.autograd.gradcheck(lambda s: tuple(propagate.leaky_relu(message, s)), slope)


@pytest.mark.parametrize("leading", [(), (3,)])
@pytest.mark.parametrize(("taps", "groups"), [((), 1), ((3,), 1), ((3, 2), 2), ((2, 2, 2), 1), ((3, 3), 4)])
def test_convolution_gradients_equal_finite_differences(
    taps: tuple[int, ...], groups: int, leading: tuple[int, ...]
) -> None:
    weight = torch.randn(8, 4 // groups, *taps, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    mean = torch.randn(*leading, 4, dtype=torch.float64, requires_grad=True)
    variance = torch.rand(*leading, 4, dtype=torch.float64, requires_grad=True)

    def function(m: Tensor, v: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return tuple(propagate.convolution(Gaussian(m, v), w, b, groups))

    assert torch.autograd.gradcheck(function, (mean, variance, weight, bias))
    assert torch.autograd.gradgradcheck(function, (mean, variance, weight, bias))


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2}, {"dilation": 2}, {"groups": 2}, {"groups": 4, "stride": 2}], ids=str
)
def test_convolution_equals_monte_carlo_through_the_real_one(options: dict[str, int]) -> None:
    groups = options.get("groups", 1)
    weight, bias = torch.randn(8, 4 // groups, 3, 3), torch.randn(8)
    message = Gaussian(torch.randn(4), torch.rand(4) + 0.1)
    x = torch.randn(4000, 4, 9, 9) * message.variance.sqrt().view(-1, 1, 1) + message.mean.view(-1, 1, 1)
    y = F.conv2d(x, weight, bias, **options)
    result = propagate.convolution(message, weight, bias, groups)
    assert ((result.mean - y.mean((0, 2, 3))).abs() < 0.02 * result.variance.sqrt()).all()
    torch.testing.assert_close(result.variance, y.var((0, 2, 3)), rtol=0.03, atol=0)


def test_linear_equals_the_covariance_of_a_linear_map() -> None:
    weight, bias, mean, variance = torch.randn(5, 7), torch.randn(5), torch.randn(7), torch.rand(7)
    result = propagate.convolution(Gaussian(mean, variance), weight, bias)
    torch.testing.assert_close(result.mean, F.linear(mean, weight, bias))
    torch.testing.assert_close(result.variance, (weight @ variance.diag() @ weight.T).diagonal())


def test_add_multiply_and_affine_equal_monte_carlo() -> None:
    first, second = (Gaussian(torch.randn(3), torch.rand(3) + 0.2) for _ in range(2))
    x, y = (torch.randn(400_000, 3) * g.variance.sqrt() + g.mean for g in (first, second))
    pairs = [
        (propagate.add(first, second), x + y),
        (propagate.multiply(first, second), x * y),
        (propagate.affine(first, -2.0, 0.5), -2 * x + 0.5),
    ]
    for result, samples in pairs:
        assert ((result.mean - samples.mean(0)).abs() < 0.01 * result.variance.sqrt()).all()
        torch.testing.assert_close(result.variance, samples.var(0), rtol=0.03, atol=0)


def test_concatenate_serves_every_group_and_gather_picks_channels() -> None:
    shared, grouped = Gaussian(torch.arange(2.0), torch.ones(2)), Gaussian(torch.randn(3, 4), torch.rand(3, 4))
    joined = propagate.concatenate([shared, grouped])
    assert joined.mean.shape == joined.variance.shape == (3, 6)
    assert torch.equal(joined.mean[:, 2:], grouped.mean)
    assert torch.equal(joined.mean[1, :2], shared.mean)
    picked = propagate.gather(joined, torch.tensor([5, 0, 0]))
    assert torch.equal(picked.variance, joined.variance[:, [5, 0, 0]])


def test_patch_moments_are_exact_for_every_weight() -> None:
    patches = torch.randn(50, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    weight, bias = torch.randn(5, 3, 2, 2, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    y = patches @ weight.flatten(1).T + bias
    covariance = torch.cov(patches.T, correction=0)
    result = propagate.patches(weight, bias, patches.mean(0), covariance)
    torch.testing.assert_close(result.mean, y.mean(0))
    torch.testing.assert_close(result.variance, y.var(0, correction=0))
    independent = propagate.patches(weight, None, patches.mean(0), covariance.diagonal())
    torch.testing.assert_close(independent.variance, weight.flatten(1).square() @ covariance.diagonal())
