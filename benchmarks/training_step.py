"""The cost of a training step with Batch Kalman Normalization against the same network with `nn.BatchNorm2d`.

    python benchmarks/training_step.py [--pairs 15] [--threads 2] [--model cifar_resnet20] [--size 32]
                                       [--cases 128:128 128:2 8:2] [--layouts last first]
                                       [--accumulate 1] [--plain-loop] [--loop-optimizer] [--compile]

A model is one of `bkn train`, `unet`, or `unet3d`, which has two levels and takes volumes; these two segment. A case
is the images of a forward and of a statistics group. As in `bkn train` the forwards of a step run inside
`bkn.accumulation` and the optimizer is fused; or they run without it (`--plain-loop`), and the optimizer is PyTorch's
default, a Python loop over parameters (`--loop-optimizer`). `--compile` compiles both networks. Not run on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable

import torch
from paired import paired
from robustness_networks import UNet
from torch import Tensor, nn
from torch.nn import functional as F

import bkn_core as bkn
from bkn_core.convert import is_converted
from bkn_core.engine.models import build_network

LAYOUTS = {"last": torch.channels_last, "first": torch.contiguous_format}
VOLUMES = "unet3d"


def build(name: str) -> nn.Module:
    """Build a network for images or, `unet3d`, for volumes."""
    if name in ("unet", VOLUMES):
        return UNet(classes=10) if name == "unet" else UNet(classes=10, widths=(16, 32, 64), dimensions=3)
    return build_network(name, classes=10)


def layout_of(name: str, model: str) -> torch.memory_format:
    """Return where channels lie, for images or volumes."""
    return torch.channels_last_3d if (name, model) == ("last", VOLUMES) else LAYOUTS[name]


def step(
    model: nn.Module, batch: tuple[Tensor, Tensor], forwards: int, *, plain: bool, fused: bool, compiled: bool
) -> Callable[[], None]:
    """Return one training step: forwards and backwards, SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=fused)
    images, labels = batch
    is_plain = plain or not is_converted(model)
    network = torch.compile(model) if compiled else model

    def run() -> None:
        with contextlib.nullcontext() if is_plain else bkn.accumulation(model):
            for _ in range(forwards):
                (F.cross_entropy(network(images), labels) / forwards).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def case(text: str) -> tuple[int, int]:
    """Read IMAGES:GROUP."""
    images, group = map(int, text.split(":"))
    return images, group


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--cases", type=case, nargs="+", default=[(128, 128), (128, 2), (8, 2)])
    parser.add_argument(
        "--layouts", choices=list(LAYOUTS), nargs="+", default=list(LAYOUTS), help="channels last, first"
    )
    parser.add_argument("--accumulate", type=int, default=1, help="forwards in a step")
    parser.add_argument("--plain-loop", action="store_true")
    parser.add_argument("--loop-optimizer", action="store_true")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    plain = build(arguments.model)
    sides = (arguments.size,) * (3 if arguments.model == VOLUMES else 2)
    is_dense = arguments.model in ("unet", VOLUMES)
    words = f"{arguments.threads} threads, {arguments.pairs} pairs, forwards in a step: {arguments.accumulate}"
    words += ", compiled" if arguments.compile else ""
    print(f"{arguments.model}, {'x'.join(map(str, sides))}, {words}")
    print("| layout | images | s | BKN / BN step time, median (quartiles) | BN step, ms |\n|---|---|---|---|---|")
    for name in arguments.layouts:
        layout = layout_of(name, arguments.model)
        for images, size in arguments.cases:
            x = torch.randn(images, 3, *sides).contiguous(memory_format=layout)
            labels = torch.randint(0, 10, (images, *sides) if is_dense else (images,))
            reference = build(arguments.model).to(memory_format=layout)
            candidate = bkn.convert(plain, x, statistics_batch_size=size, input_prior=x).to(memory_format=layout)
            steps = (
                step(
                    model.train(),
                    (x, labels),
                    arguments.accumulate,
                    plain=arguments.plain_loop,
                    fused=not arguments.loop_optimizer,
                    compiled=arguments.compile,
                )
                for model in (reference, candidate)
            )
            ratio = paired(*steps, pairs=arguments.pairs)
            print(f"| channels {name} | {images} | {size} | {ratio} | {ratio.reference_ms:.1f} |", flush=True)


if __name__ == "__main__":
    main()
