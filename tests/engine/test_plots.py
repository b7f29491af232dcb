"""Pictures of a run: axes that say nothing impossible."""

from __future__ import annotations

import pytest

from bkn_core.engine.plots import count_percent, new_figure


@pytest.mark.parametrize("values", [[0.0], [100.0, 100.0], [0.0, 100.0], [37.5, 37.6], [98.0, 100.0]])
def test_an_axis_of_percentages_counts_from_0_to_100_and_no_further(values: list[float]) -> None:
    axis = new_figure().subplots()
    axis.plot(range(len(values)), values, marker="o")
    count_percent(axis)
    ticks = axis.get_yticks()
    assert len(ticks) >= 2 and min(ticks) >= 0 and max(ticks) <= 100
    low, high = axis.get_ylim()
    assert low < min(values) and high > max(values) and high - low >= 1
