"""The peak memory of a run: on a CUDA device what tensors took, elsewhere what the process had resident."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures from when it is made.

    Args:
        device: that the run computes on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with contextlib.suppress(OSError):  # on Linux the peak can begin anew
            _RESET.write_text("5")
            return
        self.before = resident_peak() or 0

    def read(self) -> int | None:
        """Return bytes, or None where an earlier run of this process may have had more."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resident_peak()
        return peak if peak is not None and peak > self.before else None


def resident_peak() -> int | None:
    """Return the most bytes that this process had resident, None where the system does not tell.

    Linux hands `ru_maxrss` down from the process that started this one, and so is asked in another way.
    """
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())
        if found is not None:
            return 1024 * int(found[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
