"""The correction and the inflation of a prior, the gain and its schedule, the full covariance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bkn_core.filter.kalman import Gaussian, moments
from bkn_core.layers.batch_kalman import (
    BatchKalmanNorm1d,
    BatchKalmanNorm2d,
)


def test_correction_and_inflations_shift_by_standard_deviations_and_scale_by_an_exponential() -> None:
    layer = BatchKalmanNorm2d(2, correction=True, innovation=True, eps=0.0).double()
    offset, scale, inflation = torch.tensor([0.5, -1.0]), torch.tensor([0.2, 0.7]), torch.tensor([-0.4, 0.1])
    shift = torch.tensor([0.25, 3.0])
    state = {"prior_offset": offset, "prior_log_scale": scale, "innovation": inflation, "mean_innovation": shift}
    layer.load_state_dict(state, strict=False)
    mean, variance = np.array([1.0, 2.0]), np.array([4.0, 9.0])
    refined = layer.refine(Gaussian(torch.tensor(mean), torch.tensor(variance)))
    np.testing.assert_allclose(refined.mean.detach(), mean + (offset + shift).numpy() * np.sqrt(variance), rtol=1e-6)
    np.testing.assert_allclose(refined.variance.detach(), variance * np.exp((scale + inflation).numpy()), rtol=1e-6)


def test_gain_is_the_sigmoid_of_its_parameter_times_the_schedule() -> None:
    layer = BatchKalmanNorm1d(3, gain=0.02)
    assert float(layer.gain.detach()) == pytest.approx(0.02)
    layer.gain_factor.fill_(0.5)
    assert float(layer.gain.detach()) == pytest.approx(0.01)
    layer.gain_factor.zero_()
    x, prior = torch.randn(6, 3), Gaussian(torch.full((3,), 0.5), torch.full((3,), 4.0))
    torch.testing.assert_close(layer(x, prior), (x - 0.5) / np.sqrt(4 + 1e-5))


def test_training_moves_the_gain() -> None:
    layer = BatchKalmanNorm1d(3, gain=0.5)
    layer(5 + torch.randn(8, 3), Gaussian(torch.zeros(3), torch.ones(3))).square().sum().backward()
    assert layer.gain_logit.grad is not None and layer.gain_logit.grad != 0


def test_transition_starts_as_a_rectangular_identity() -> None:
    wide, narrow = (BatchKalmanNorm2d(c, previous_features=p).transition for c, p in [(5, 2), (2, 4)])
    for matrix, previous in ((wide, 2), (narrow, 4)):
        assert isinstance(matrix, nn.Parameter)
        for i, row in enumerate(matrix.tolist()):
            assert row == [float(j == i % previous) for j in range(previous)]


def test_full_covariance_normalizes_by_the_diagonal_of_the_full_update() -> None:
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    full = BatchKalmanNorm2d(3, covariance="full", gain=0.3, statistics_batch_size=2).double()
    plain = BatchKalmanNorm2d(3, gain=0.3, statistics_batch_size=2).double()
    prior = Gaussian(torch.randn(3).double(), torch.rand(3).double() + 0.5)
    y, posterior = full.filter(x, prior)
    torch.testing.assert_close(y, plain(x, prior))
    assert posterior is not None and posterior.variance.shape == (2, 3, 3)
    torch.testing.assert_close(full.running_var, plain.running_var)
    matrices = Gaussian(prior.mean.expand(2, 3), torch.diag_embed(prior.variance).expand(2, 3, 3))
    torch.testing.assert_close(full(x, matrices), y)
    observed = moments(x, 2, covariance=True)
    d = observed.mean - prior.mean
    q = full.gain
    expected = (1 - q) * torch.diag(prior.variance) + q * observed.variance + q * (1 - q) * d[:, :, None] * d[:, None]
    torch.testing.assert_close(posterior.variance, expected)
