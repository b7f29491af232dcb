"""Group Kalman Normalization: two layers against their formula in float64, and what passes between them."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import torch
from torch import nn

from bkn_core.layers.rivals.group_kalman import GroupKalmanNorm


def drawn_pair() -> nn.Sequential:
    first, second = GroupKalmanNorm(2, 4, 1e-3), GroupKalmanNorm(3, 6, 1e-3)
    second.follow_(first)
    pair = nn.Sequential(first, nn.Conv2d(4, 6, 1), second)
    for parameter in pair.parameters():
        nn.init.normal_(parameter)
    return pair.double()


def test_the_second_layer_blends_its_moments_with_the_firsts_prediction() -> None:
    pair, x = drawn_pair(), torch.randn(3, 4, 5, 2, dtype=torch.float64)
    first, convolution, second = pair
    between = first(x)
    torch.testing.assert_close(between, nn.functional.group_norm(x, 2, first.weight, first.bias, 1e-3))
    values = convolution(between).detach()
    found = second(values)
    expected = np.empty(found.shape)
    q = 1 / (1 + np.exp(-second.gain_logit.item()))
    a, r = second.transition.detach().numpy(), second.noise.item() ** 2
    for n in range(3):
        means = np.array([x[n, 2 * j : 2 * j + 2].mean().item() for j in range(2)])
        variances = np.array([x[n, 2 * j : 2 * j + 2].var(correction=0).item() for j in range(2)])
        for j in range(3):
            group = values[n, 2 * j : 2 * j + 2].numpy()
            prior_mean, prior_variance = a[j] @ means, a[j] ** 2 @ variances + r
            mean = prior_mean + q * (group.mean() - prior_mean)
            apart = q * (1 - q) * (group.mean() - prior_mean) ** 2
            variance = (1 - q) * prior_variance + q * group.var() + apart
            for c in (2 * j, 2 * j + 1):
                z = (values[n, c].numpy() - mean) / np.sqrt(variance + 1e-3)
                expected[n, c] = second.weight[c].item() * z + second.bias[c].item()
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-9)


def test_transition_noise_and_gain_are_learned() -> None:
    pair = drawn_pair()
    pair(torch.randn(3, 4, 5, 2, dtype=torch.float64)).square().sum().backward()
    second = pair[2]
    assert all(p.grad.abs().sum() > 0 for p in (second.transition, second.noise, second.gain_logit))


def test_copies_are_made_between_two_layers_and_stay_apart() -> None:
    pair, x = drawn_pair(), torch.randn(3, 4, 5, 2, dtype=torch.float64)
    expected = pair(x)
    pair[0](x + 1)  # the second layer has not run
    for other in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert other[0].target is other[2].source is not pair[0].target
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
