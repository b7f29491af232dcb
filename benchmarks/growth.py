"""How the cost of Batch Kalman Normalization over `nn.BatchNorm2d` grows: with channels, depth, image size and groups.

    python benchmarks/growth.py [--pairs 15] [--threads 2]

Whole training steps in channels last; one quantity changes, the others stay at ResNet-20, 32×32, 32 images in groups of
two. Not run on a GPU.
"""

from __future__ import annotations

import argparse

import torch
from paired import Ratio, paired
from torch import nn
from training_step import step

import bkn_core as bkn
from bkn_core.engine.models import build_network

IMAGES, SIZE = 32, 32


def plain(width: int) -> nn.Module:
    """Return four convolutions of one width."""
    layers: list[nn.Module] = []
    for inputs in (3, width, width, width):
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def ratio(network: nn.Module, size: int, group: int, pairs: int) -> Ratio:
    """Time one training step of both."""
    layout = torch.channels_last
    x = torch.randn(IMAGES, 3, size, size).contiguous(memory_format=layout)
    labels = torch.randint(0, 10, (IMAGES,))
    candidate = bkn.convert(network, x, statistics_batch_size=group, input_prior=x).to(memory_format=layout)
    reference = network.to(memory_format=layout)
    works = (
        step(model.train(), (x, labels), 1, plain=False, fused=True, compiled=False) for model in (reference, candidate)
    )
    return paired(*works, pairs=pairs)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    residual = "cifar_resnet{}".format
    cases = [("channels (four 3×3 convolutions)", width, plain(width), SIZE, 2) for width in (16, 32, 64)]
    cases += [("depth", depth, build_network(residual(depth), classes=10), SIZE, 2) for depth in (8, 20, 56)]
    cases += [("image size", size, build_network(residual(20), classes=10), size, 2) for size in (16, 32, 64)]
    cases += [("s", group, build_network(residual(20), classes=10), SIZE, group) for group in (32, 8, 2, 1)]
    print("| what changes | to | BKN step / BN step (quartiles) |\n|---|---|---|")
    for what, value, network, size, group in cases:
        print(f"| {what} | {value} | {ratio(network, size, group, arguments.pairs)} |", flush=True)


if __name__ == "__main__":
    main()
