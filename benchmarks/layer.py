"""The cost of one layer, forward and backward, against `nn.BatchNorm2d` and the other ways to write it.

    python benchmarks/layer.py [--places 10] [--pairs 10] [--threads 2] [--type float32] [--shapes 32x64x32x32 ...]
        [--keep-memory]

The time of one layer depends by ten percent on where in memory its tensors happen to lie, so everything is made anew in
several places, and the pairs of all places count.

Columns: Batch Kalman Normalization over batch normalization of the whole batch; then over group normalization, over the
plain composition of `bkn_core.filter.kalman`, and over a Python loop of batch normalization over the groups, each on
the same groups. Layers stand alone, so each moves its own statistics. Not run on a GPU.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable

import torch
from paired import Ratio, keep_memory, summary, times
from torch import Tensor, nn

from bkn_core.filter.kalman import Gaussian, moments, normalize, spread_over_images, update
from bkn_core.layers.batch_kalman import BatchKalmanNorm2d

LAYOUTS = {torch.channels_last: "channels last", torch.contiguous_format: "channels first"}
SHAPES = [(2, 64, 56, 56), (32, 64, 32, 32), (32, 128, 16, 16), (128, 64, 32, 32)]


def candidates(channels: int, size: int | None, kind: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the layers to compare, by name."""
    layer = BatchKalmanNorm2d(channels, statistics_batch_size=size, innovation=True)
    prior = Gaussian(torch.zeros(channels), torch.ones(channels))
    whole, groups = nn.BatchNorm2d(channels), nn.GroupNorm(min(32, channels), channels).to(kind)

    def plain(x: Tensor) -> Tensor:
        posterior = update(prior, moments(x, size), layer.gain)
        rows = Gaussian(*(spread_over_images(values, len(x), size) for values in posterior))
        return normalize(x, rows, layer.weight, layer.bias, layer.eps)

    def loop(x: Tensor) -> Tensor:
        return torch.cat([whole(part) for part in x.split(size or len(x))])

    return {"bkn": lambda x: layer(x, prior), "bn": whole, "gn": groups, "plain": plain, "loop": loop}


def training(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Return one forward and backward."""
    upstream = torch.randn_like(x)

    def run() -> None:
        layer(x).backward(upstream)
        x.grad = None

    return run


def measured(
    sizes: tuple[int, ...], layout: torch.memory_format, size: int | None, options: argparse.Namespace
) -> list[Ratio]:
    """Return the time of our layer over that of each of the others."""
    others = ("bn", "gn", "plain", "loop")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in others}
    chance = random.Random(0)
    for _ in range(options.places):
        between = [torch.empty(chance.randrange(1, 300_000)) for _ in range(chance.randrange(1, 12))]
        x = torch.randn(sizes).to(getattr(torch, options.type)).contiguous(memory_format=layout).requires_grad_()
        works = {name: training(layer, x) for name, layer in candidates(sizes[1], size, x.dtype).items()}
        for name in others:
            found[name] += times(works[name], works["bkn"], pairs=options.pairs)
        del between
    return [summary(found[name]) for name in others]


def shape(text: str) -> tuple[int, ...]:
    """Read NxCxHxW."""
    return tuple(map(int, text.split("x")))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--places", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--keep-memory", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--type", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.keep_memory:
        keep_memory()
    words = f"{arguments.places} places with {arguments.pairs} pairs each"
    print(f"{arguments.type}, {arguments.threads} threads, {words}, median (quartiles)")
    print("| shape | layout | s | over BN | over GN | over plain | over loop |\n|---|---|---|---|---|---|---|")
    for sizes in arguments.shapes:
        for layout, name in LAYOUTS.items():
            for size in (None, 8, 2, 1):
                if size is None or size < sizes[0]:
                    ratios = " | ".join(map(str, measured(sizes, layout, size, arguments)))
                    print(f"| {'×'.join(map(str, sizes))} | {name} | {size or 'all'} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
