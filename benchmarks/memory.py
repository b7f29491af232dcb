"""The peak memory of training steps with Batch Kalman Normalization against the same network with `nn.BatchNorm2d`.

    python benchmarks/memory.py [--model resnet50] [--size 224] [--images 2] [--steps 4] [--repeats 5] [--heap]

Each network trains in a process of its own; what is compared is the largest resident set of the process beyond the one
before the first step, which holds the weights. Large tensors get pages of their own, which go back when a tensor is
freed; with `--heap` the C library may keep them on its heap, as it does by default, and holes between tensors count as
well. Linux with the GNU C library. Not run on a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import resource
import statistics

import torch
from torch.nn import functional as F

import bkn_core as bkn
from bkn_core.engine.models import build_network

_MMAP_THRESHOLD, _LARGE = -3, 2**17  # `mallopt` of the GNU C library: its option, and from how many bytes on


def peak(name: str, size: int, images: int, steps: int, heap: bool, group: int | None) -> float:
    """Return the peak in MiB of one network's steps; `group` None is batch normalization."""
    if not heap:
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = build_network(name, classes=10).train()
    x = torch.randn(images, 3, size, size).contiguous(memory_format=torch.channels_last)
    if group is not None:
        model = bkn.convert(model, x[:1, :, :32, :32], statistics_batch_size=group, input_prior=x).train()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    ctypes.CDLL(None).malloc_trim(0)  # what building the network has freed is not there for the steps
    before = _resident()
    for _ in range(steps):
        F.cross_entropy(model(x), torch.zeros(images, dtype=torch.long)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def _resident() -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--heap", action="store_true")
    arguments = parser.parse_args()
    found: dict[int | None, list[float]] = {None: [], 2: [], 1: []}
    for _ in range(arguments.repeats):
        for group, peaks in found.items():
            work = (arguments.model, arguments.size, arguments.images, arguments.steps, arguments.heap, group)
            with multiprocessing.get_context("spawn").Pool(1) as process:
                peaks.append(process.apply(peak, work))
    reference = statistics.median(found[None])
    print(f"{arguments.model}, {arguments.images} images of {arguments.size}x{arguments.size}: peak of a training step")
    print("| norm | MiB, median (smallest to largest) | over BN |\n|---|---|---|")
    for group, peaks in found.items():
        name, value = "BN" if group is None else f"BKN, s = {group}", statistics.median(peaks)
        print(f"| {name} | {value:.0f} ({min(peaks):.0f} to {max(peaks):.0f}) | {value / reference:.3f} |")


if __name__ == "__main__":
    main()
