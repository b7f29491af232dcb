"""What a training step asks of a GPU: operations of PyTorch and kernels in Triton, for BN and BKN. Counted, not timed.

    python benchmarks/launches.py [--models cifar_resnet20 resnet50 efficientnet_b0 unet] [--processors 132]

A launch costs the host 5 to 10 microseconds whatever it does, which is what a step of few images waits for. Without a
GPU Triton's kernels are counted and not run, and tensors lie on the CPU: the operations are the same. Views, which
launch nothing, are left out. The step: two images in a group, cross entropy, SGD over all parameters at once.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

from robustness_networks import build
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bkn_core as bkn
from bkn_core.ops import backend

SIZES = {"cifar_resnet20": 32, "unet": 64}
VIEWS = frozenset(["_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "expand", "narrow"])
VIEWS |= frozenset(["permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind"])
VIEWS |= frozenset(["unfold", "unsqueeze", "view"])


class Counter(TorchDispatchMode):
    """Counts the operations of PyTorch by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, operation: Any, _: Any, arguments: Any = (), options: Any = None) -> Any:
        name = operation._schema.name.partition("::")[2]
        if name not in VIEWS and not name.startswith("_record_function"):
            self.operations[name] += 1
        return operation(*arguments, **(options or {}))


@contextlib.contextmanager
def launches(processors: int) -> Iterator[collections.Counter[str]]:
    """Count the launches of Triton's kernels, and leave them out where the interpreter would run them."""
    from triton.runtime import interpreter, jit

    from bkn_core.ops.cuda import normalize

    found: collections.Counter[str] = collections.Counter()
    kind = jit.JITFunction if torch.cuda.is_available() else interpreter.InterpretedFunction
    run = kind.run

    def counted(kernel: Any, *arguments: Any, **options: Any) -> Any:
        found[kernel.fn.__name__] += 1
        return run(kernel, *arguments, **options) if torch.cuda.is_available() else None

    with mock.patch.object(kind, "run", counted), mock.patch.object(normalize, "_processors", lambda _: processors):
        yield found


def step(model: nn.Module, images: Tensor, *, shares: bool) -> Callable[[], None]:
    """Return a training step, inside `bkn.accumulation` where it shares priors."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=True)

    def run() -> None:
        with bkn.accumulation(model) if shares else contextlib.nullcontext():
            y = model(images)
            y = y if y.dim() == 2 else y.flatten(2).mean(2)
            nn.functional.cross_entropy(y, torch.zeros(len(y), dtype=torch.int64, device=y.device)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def counted(run: Callable[[], None], processors: int) -> tuple[int, int]:
    """Return operations and launches of a step, the third."""
    with launches(processors) as kernels:
        run(), run()
        kernels.clear()
        with Counter() as counter:
            run()
    return counter.operations.total(), kernels.total()


def measured(name: str, size: int, processors: int) -> tuple[int, list[tuple[int, int]]]:
    """Return the operations with BN, and operations and launches with BKN in a plain loop and inside `accumulation`."""
    images = torch.randn(2, 3, size, size, device="cuda" if torch.cuda.is_available() else "cpu")
    plain = build(name, classes=10, channels=3).to(images.device).train()
    converted = bkn.convert(plain, images, statistics_batch_size=2, input_prior=images).train()
    (reference, _), *found = (
        counted(step(model, images, shares=shares), processors)
        for model, shares in ((plain, False), (converted, False), (converted, True))
    )
    return reference, found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cifar_resnet20", "resnet50", "efficientnet_b0", "unet"])
    parser.add_argument("--processors", type=int, default=132, help="of the GPU; large layers are divided over them")
    arguments = parser.parse_args()
    os.environ.setdefault("BKN_BACKEND", "triton")
    if not backend.takes_triton("cuda" if torch.cuda.is_available() else "cpu"):
        parser.error("Triton is not there: pip install triton")
    print("| network, two images | BN | BKN: operations + launches | over BN | inside `accumulation` | over BN |")
    print("|---|---|---|---|---|---|")
    for name in arguments.models:
        size = SIZES.get(name, 224)
        reference, found = measured(name, size, arguments.processors)
        words = [
            f"{operations} + {kernels} | {(operations + kernels) / reference:.2f}" for operations, kernels in found
        ]
        print(f"| {name}, {size}×{size} | {reference} | {' | '.join(words)} |", flush=True)


if __name__ == "__main__":
    main()
