"""How much a step depends on how its images are split over forwards: two of eight images against one of sixteen.

    python benchmarks/split_steps.py [--steps 100] [--trials 10]

Statistics groups are the same both times. Printed is |g - g'| / |g| of the gradient of all parameters, on
`cifar_resnet8` and scikit-learn's digits, after some steps of training.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bkn_core as bkn
from bkn_core.engine.arrays import open_digits
from bkn_core.engine.models import build_network

IMAGES = 16


def gradient(model: nn.Module, images: Tensor, labels: Tensor, parts: int, *, together: bool) -> Tensor:
    """Return the gradient of the mean loss over all parts, which run one after another."""
    model = copy.deepcopy(model)
    with bkn.accumulation(model) if together else contextlib.nullcontext():
        for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            (F.cross_entropy(model(x), y) / parts).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def trained(size: int, images: Tensor, labels: Tensor, steps: int) -> nn.Module:
    """Return a network with groups of `size` images after some steps."""
    network = build_network("cifar_resnet8", classes=10, channels=1)
    model = bkn.convert(network, images[:2], statistics_batch_size=size, input_prior=images[:256])
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        chosen = torch.randint(len(images), (IMAGES,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return model


def main(words: Sequence[str] | None = None) -> None:
    """Print a line for each size of the groups and each way to split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--trials", type=int, default=10)
    given = parser.parse_args(words)
    torch.manual_seed(0)
    source = open_digits()[0]
    images, labels = source.images.float() / 255 - 0.3, source.labels
    for size in (2, 1):
        model = trained(size, images, labels, given.steps)
        for together in (False, True):
            apart = []
            for _ in range(given.trials):
                chosen = torch.randint(len(images), (IMAGES,))
                whole = gradient(model, images[chosen], labels[chosen], 1, together=together)
                halves = gradient(model, images[chosen], labels[chosen], 2, together=together)
                apart.append(((whole - halves).norm() / whole.norm()).item())
            way = "inside bkn.accumulation" if together else "one after another"
            print(f"groups of {size}, two forwards {way}: mean {sum(apart) / len(apart):.3f}, most {max(apart):.3f}")


if __name__ == "__main__":
    main()
