"""Long use: tens of thousands of micro-steps without growth or slowing down.

    python benchmarks/endurance.py [--steps 50000]

Printed every tenth of the steps: milliseconds a step, resident memory and open files. Ends with 1 where memory or files
grew by more than a tenth after the first tenth, or steps became slower by half. Linux; not run on a GPU.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

import bkn_core as bkn
from bkn_core.engine.models import build_network

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> float:
    """Return the resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


def train(steps: int) -> bool:
    """Train on two random images a step; return whether nothing grew."""
    torch.manual_seed(0)
    network = build_network("cifar_resnet8", classes=10, channels=3)
    images, labels = torch.randn(256, 3, 8, 8), torch.randint(10, (256,))
    model = bkn.convert(network, images[:2], statistics_batch_size=1, input_prior=images)
    optimizer = torch.optim.SGD(model.parameters(), 0.005, momentum=0.9)
    rows, started = [], time.perf_counter()
    for step in range(1, steps + 1):
        chosen = torch.randint(256, (2,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        if step % max(1, steps // 10) == 0:
            now = time.perf_counter()
            rows.append((1000 * (now - started) / (steps // 10), resident(), len(os.listdir("/proc/self/fd"))))
            print("step {}: {:.2f} ms, {:.0f} MiB, {} files".format(step, *rows[-1]), flush=True)
            started = now
    fastest = min(row[0] for row in rows)
    return rows[-1][1] < 1.1 * rows[0][1] and rows[-1][2] <= rows[0][2] and rows[-1][0] < 1.5 * fastest


def main(words: Sequence[str] | None = None) -> None:
    """Train, and end with 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50_000)
    raise SystemExit(0 if train(parser.parse_args(words).steps) else 1)


if __name__ == "__main__":
    main()
