"""How long ONNX Runtime takes for a batch."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from torch import Tensor

from bkn_core.export.providers import create_session, run_session

_BATCH_SIZES = (1, 32)
_WARM_UP, _RUNS = 10, 50


def measure_latency(graph: bytes, example: Tensor, device: str) -> dict[str, Any]:
    """Return the median and the 90th percentile, in milliseconds, over 50 runs at batch 1 and 32.

    Args:
        graph: bytes of an ONNX file.
        example: images whose shape is timed.
        device: what ONNX Runtime is to run on.
    """
    opened = create_session(graph, device)
    generator = np.random.default_rng(0)
    result: dict[str, Any] = {"provider": opened.provider, "runs": _RUNS}
    for size in _BATCH_SIZES:
        images = generator.standard_normal((size, *example.shape[1:]), np.float32)
        times = []
        for _ in range(_WARM_UP + _RUNS):
            start = time.perf_counter()
            run_session(opened.session, images)
            times.append(1000 * (time.perf_counter() - start))
        p50, p90 = np.percentile(times[_WARM_UP:], [50, 90])
        result[f"batch_{size}"] = {"p50_ms": round(float(p50), 4), "p90_ms": round(float(p90), 4)}
    return result
