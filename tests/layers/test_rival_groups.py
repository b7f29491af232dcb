"""What normalizations with a memory share, against loops."""

from __future__ import annotations

import pytest
import torch

from bkn_core.layers.rivals.groups import group_means, moving_average, recurrence


@pytest.mark.parametrize("length", [0, 1, 2, 5, 8, 33])
def test_a_recurrence_equals_its_loop(length: int) -> None:
    factors, increments = torch.randn(2, length, 3, dtype=torch.float64).unbind()
    state = torch.randn(3, dtype=torch.float64)
    found, expected = recurrence(factors, increments, state), [state]
    for factor, increment in zip(factors, increments, strict=True):
        expected.append(factor * expected[-1] + increment)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_a_recurrence_whose_factors_vanish_forgets() -> None:
    found = recurrence(torch.zeros(4, 1), torch.arange(4.0)[:, None], torch.tensor([9.0]))
    assert found.flatten().tolist() == [9, 0, 1, 2, 3]


def test_a_moving_average_equals_its_loop() -> None:
    values, state = torch.randn(6, 2), torch.randn(2)
    found = moving_average(values, 0.9, state)
    for row, value in zip(found, values, strict=False):
        torch.testing.assert_close(row, state)
        state = 0.9 * state + 0.1 * value
    torch.testing.assert_close(found[-1], state)


@pytest.mark.parametrize("size", [None, 1, 2, 3, 5, 9])
def test_group_means_average_the_last_group_by_its_own_images(size: int | None) -> None:
    rows = torch.randn(5, 3)
    expected = torch.stack([part.mean(0) for part in rows.split(size or 5)])
    torch.testing.assert_close(group_means(rows, size), expected)
