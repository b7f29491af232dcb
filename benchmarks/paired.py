"""Paired, interleaved timing: A B A B ..., and the median of the ratios, so that a busy machine disturbs both alike."""

from __future__ import annotations

import ctypes
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Work = Callable[[], object]
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # options of `mallopt`


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Time of a candidate over time of a reference: median and quartiles over the pairs, and the reference's median."""

    median: float
    low: float
    high: float
    reference_ms: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def paired(reference: Work, candidate: Work, *, pairs: int = 15, warmup: int = 3) -> Ratio:
    """Time two pieces of work in turn, swapping who goes first."""
    return summary(times(reference, candidate, pairs=pairs, warmup=warmup))


def times(reference: Work, candidate: Work, *, pairs: int = 15, warmup: int = 3) -> list[tuple[float, float]]:
    """Return the seconds of a reference and of a candidate, pair by pair."""
    for _ in range(warmup):
        reference()
        candidate()
    found = []
    for i in range(pairs):
        first, second = (reference, candidate) if i % 2 == 0 else (candidate, reference)
        taken = {id(first): _seconds(first), id(second): _seconds(second)}
        found.append((taken[id(reference)], taken[id(candidate)]))
    return found


def summary(found: Sequence[tuple[float, float]]) -> Ratio:
    """Return the median ratio of pairs."""
    low, median, high = statistics.quantiles([candidate / reference for reference, candidate in found], n=4)
    return Ratio(median, low, high, 1000 * statistics.median(reference for reference, _ in found))


def keep_memory() -> None:
    """Let the C library keep what is freed, where it is GNU's.

    In a short loop it gives pages back now and then and asks for them again, which takes as long as the work on them
    and falls to whoever comes next.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_TRIM_THRESHOLD, 2**30)
        library.mallopt(_MMAP_THRESHOLD, 2**25)


def _seconds(work: Work) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
