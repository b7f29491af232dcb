"""The filter's equations against NumPy loops in float64."""

from __future__ import annotations

import kalman_loops
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkn_core.filter.kalman import (
    Gaussian,
    Moments,
    diagonal,
    group_images,
    guard,
    moments,
    normalize,
    predict,
    spread_over_images,
    update,
)

SHAPES = [(6, 3), (7, 4, 5), (5, 3, 2, 4), (4, 2, 2, 3, 2), (3, 1, 1, 1), (1, 3, 4)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: np.ndarray, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(actual.numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("images", "size", "expected"),
    [(4, 2, [2, 2]), (5, 2, [2, 2, 1]), (3, None, [3]), (3, 8, [3]), (3, 1, [1, 1, 1]), (1, 1, [1])],
)
def test_groups_are_consecutive_images_and_the_last_may_be_smaller(
    images: int, size: int | None, expected: list[int]
) -> None:
    assert group_images(images, size) == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [None, 1, 2, 3, 100])
def test_moments_equal_a_loop_over_groups(shape: tuple[int, ...], size: int | None) -> None:
    x = 3 + 2 * numbers(*shape)
    mean, covariance, count = kalman_loops.observe(x.numpy(), size)
    observed, full = moments(x, size), moments(x, size, covariance=True)
    close(observed.mean, mean)
    close(observed.variance, np.array([np.diag(c) for c in covariance]))
    close(full.variance, covariance)
    close(full.mean, mean)
    assert observed.count.tolist() == count.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moments_of_half_precision_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = (100 + numbers(4, 3, 8, 8)).to(dtype)
    mean, covariance, _ = kalman_loops.observe(x.double().numpy(), 2)
    observed = moments(x, 2)
    assert observed.mean.dtype == observed.variance.dtype == torch.float32
    close(observed.mean, mean, 1e-5)
    close(observed.variance, np.array([np.diag(c) for c in covariance]), 1e-4)


def test_prediction_is_a_linear_map_of_the_covariance() -> None:
    transition, mean, root = numbers(3, 4), numbers(2, 4, seed=1), numbers(2, 4, 4, seed=2)
    covariance = root @ root.transpose(1, 2)
    predicted = predict(Gaussian(mean, covariance), transition, torch.tensor(0.3, dtype=torch.float64))
    a = transition.numpy()
    for g in range(2):
        close(predicted.mean[g], a @ mean[g].numpy())
        close(predicted.variance[g], a @ covariance[g].numpy() @ a.T + 0.3 * np.eye(3))


def test_diagonal_prediction_equals_the_full_one_of_a_diagonal_covariance() -> None:
    transition, mean, variance = numbers(3, 4), numbers(2, 4, seed=1), numbers(2, 4, seed=2).square()
    noise = torch.tensor(0.1, dtype=torch.float64)
    full = predict(Gaussian(mean, torch.diag_embed(variance)), transition, noise)
    plain = predict(Gaussian(mean, variance), transition, noise)
    torch.testing.assert_close(plain.variance, diagonal(full).variance)
    torch.testing.assert_close(plain.mean, full.mean)


@settings(max_examples=40)
@given(
    shape=st.sampled_from(SHAPES),
    size=st.sampled_from([None, 1, 2, 3]),
    gain=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    per_group=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_update_and_normalize_equal_a_loop(
    shape: tuple[int, ...], size: int | None, gain: float, per_group: bool, seed: int
) -> None:
    x = 1 + numbers(*shape, seed=seed)
    count = len(group_images(shape[0], size))
    rows = (count, shape[1]) if per_group else (shape[1],)
    prior = Gaussian(numbers(*rows, seed=seed + 1), numbers(*rows, seed=seed + 2).square())
    weight, bias = numbers(shape[1], seed=seed + 3), numbers(shape[1], seed=seed + 4)
    expected = kalman_loops.filtered(
        x.numpy(),
        (prior.mean.numpy(), prior.variance.numpy()),
        gain,
        (weight.numpy(), bias.numpy()),
        eps=1e-3,
        size=size,
    )
    q = torch.tensor(gain, dtype=torch.float64)
    posterior = update(prior, moments(x, size), q)
    matrix_prior = Gaussian(prior.mean, torch.diag_embed(prior.variance))
    full = update(matrix_prior, moments(x, size, covariance=True), q)
    close(full.variance, expected.covariance)
    close(posterior.mean, expected.mean)
    close(posterior.variance, np.array([np.diag(c) for c in expected.covariance]))
    torch.testing.assert_close(diagonal(full).variance, posterior.variance)
    assert (posterior.variance >= 0).all()
    rows_of_images = Gaussian(*(spread_over_images(t, len(x), size) for t in posterior))
    close(normalize(x, rows_of_images, weight, bias, 1e-3), expected.y)


def test_gain_one_trusts_the_observation_and_gain_zero_the_prior() -> None:
    observed = Moments(numbers(2, 3), numbers(2, 3, seed=1).square(), torch.tensor([4.0, 4.0]))
    prior = Gaussian(numbers(2, 3, seed=2), numbers(2, 3, seed=3).square())
    one, zero = (update(prior, observed, torch.tensor(q, dtype=torch.float64)) for q in (1.0, 0.0))
    torch.testing.assert_close(one.mean, observed.mean, rtol=0, atol=1e-15)
    assert torch.equal(one.variance, observed.variance)
    assert torch.equal(zero.mean, prior.mean)
    assert torch.equal(zero.variance, prior.variance)


@pytest.mark.parametrize("per_group", [False, True])
def test_update_takes_one_gain_per_group_in_both_forms(per_group: bool) -> None:
    x = numbers(4, 3, 5)
    gain = torch.tensor([[0.2], [0.9]], dtype=torch.float64)
    rows = (2, 3) if per_group else (3,)
    prior = Gaussian(numbers(*rows, seed=1), numbers(*rows, seed=2).square())
    plain = update(prior, moments(x, 2), gain)
    full = update(Gaussian(prior.mean, torch.diag_embed(prior.variance)), moments(x, 2, covariance=True), gain)
    torch.testing.assert_close(diagonal(full).variance, plain.variance)
    for g in range(2):
        own = Gaussian(*(t[g] if per_group else t for t in prior))
        alone = update(own, Gaussian(moments(x, 2).mean[g], moments(x, 2).variance[g]), gain[g])
        torch.testing.assert_close(alone.variance, plain.variance[g])


@settings(max_examples=60)
@given(
    mean=st.floats(-1e4, 1e4),
    prior_mean=st.floats(-1e4, 1e4),
    variance=st.floats(0, 1e6),
    prior_variance=st.floats(0, 1e6),
    gain=st.floats(0, 1),
)
def test_posterior_variance_is_never_negative(
    mean: float, prior_mean: float, variance: float, prior_variance: float, gain: float
) -> None:
    def row(value: float) -> Tensor:
        return torch.tensor([[value]])

    posterior = update(
        Gaussian(row(prior_mean), row(prior_variance)), Gaussian(row(mean), row(variance)), torch.tensor(gain)
    )
    assert float(posterior.variance) >= 0


def test_full_posterior_covariance_is_positive_semidefinite() -> None:
    root = numbers(1, 4, 4)
    prior = Gaussian(numbers(1, 4, seed=1), root @ root.transpose(1, 2))
    posterior = update(prior, moments(numbers(2, 4, seed=2), covariance=True), torch.tensor(0.3, dtype=torch.float64))
    assert torch.linalg.eigvalsh(posterior.variance).min() > -1e-12


def test_guard_drops_the_prior_of_those_groups_alone_whose_variances_it_overestimates() -> None:
    prior, gain = torch.tensor([1.0, 4.0]), torch.tensor(0.25)
    observed = torch.tensor([[1.0, 1.0], [0.1, 0.1], [0.01, 0.04], [0.0101, 0.0401]])
    expected = [1.0 if np.mean([1 / s, 4 / t]) >= 100 else 0.25 for s, t in observed.double().tolist()]
    assert guard(prior, observed, gain, 100.0).squeeze(1).tolist() == expected == [0.25, 0.25, 1.0, 0.25]


def test_guard_takes_nothing_from_a_channel_that_was_observed_constant() -> None:
    assert guard(torch.ones(2), torch.zeros(1, 2), torch.tensor(0.5), 100.0).tolist() == [[0.5]]
    assert guard(torch.full((2,), 300.0), torch.tensor([[0.0, 1.0]]), torch.tensor(0.5), 100.0).tolist() == [[1.0]]
    assert guard(torch.zeros(2), torch.zeros(1, 2), torch.tensor(0.5), 100.0).tolist() == [[0.5]]


@pytest.mark.parametrize(("images", "size"), [(4, 2), (5, 2), (5, None), (3, 1), (2, 7)])
def test_rows_are_spread_over_the_images_of_their_group(images: int, size: int | None) -> None:
    sizes = group_images(images, size)
    rows = torch.arange(len(sizes))[:, None].expand(-1, 3)
    expected = [g for g, count in enumerate(sizes) for _ in range(count)]
    assert spread_over_images(rows, images, size)[:, 0].tolist() == expected


def test_normalize_keeps_the_type_of_the_activation() -> None:
    x = torch.randn(2, 3, 4, 4).bfloat16()
    assert normalize(x, Gaussian(torch.zeros(2, 3), torch.ones(2, 3)), None, None, 1e-5).dtype == torch.bfloat16
