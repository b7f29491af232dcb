"""Tests of the peak memory of a run."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from bkn_core.engine import memory
from bkn_core.engine.memory import PeakMemory

SIZE = 2**25


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak does not begin anew")
def test_the_peak_counts_what_was_there_for_a_moment_and_begins_anew() -> None:
    device = torch.device("cpu")
    peak = PeakMemory(device)
    before = peak.read()
    assert before is not None
    with mmap.mmap(-1, SIZE) as pages:  # pages of its own: a tensor may be laid where an earlier one was freed
        pages.write(bytes(SIZE))
    high = peak.read()
    assert high is not None and high > before + 0.8 * SIZE
    low = PeakMemory(device).read()
    assert low is not None and low < high - 0.8 * SIZE


def test_a_peak_that_an_earlier_run_may_have_made_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([500, 500, 600])  # at the beginning, then at two readings
    monkeypatch.setattr(memory, "resident_peak", lambda: next(peaks))
    monkeypatch.setattr(memory, "_RESET", tmp_path / "nowhere" / "clear_refs")
    peak = PeakMemory(torch.device("cpu"))
    assert [peak.read(), peak.read()] == [None, 600]
