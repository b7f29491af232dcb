"""Priors behind pools against what the layers see, for four ideas of how independent neighbouring positions are.

    python benchmarks/pools.py FOLDER [--side 96] [--images 32]

FOLDER holds photographs, one folder per class. The models have random weights.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torchvision
from architectures import draw_norms
from torch import Tensor, nn
from torchvision.transforms import v2

import bkn_core as bkn
from bkn_core.graph.rules import spatial
from bkn_core.priors.hooks import find_hooks

MODELS = ("resnet18", "googlenet", "vgg11_bn", "densenet121", "regnet_y_400mf", "mobilenet_v3_small")
POWERS = {"equal": (1e-9, 0.0), "k^0.25": (0.25, 0.25), "as in bkn": (0.5, 0.4), "independent": (1.0, 1.0)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--images", type=int, default=32)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images = photographs(arguments.folder, arguments.side, arguments.images)
    print("| model | layers behind pools |", " | ".join(POWERS), "|\n|---|---|" + "---|" * len(POWERS))
    for name in MODELS:
        print(row(name, images), flush=True)


def photographs(folder: str, side: int, count: int) -> Tensor:
    """Return normalized images drawn from a folder."""
    steps = [v2.Resize((side, side)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.25])]
    data = torchvision.datasets.ImageFolder(folder, v2.Compose(steps))
    return torch.stack([data[int(i)][0] for i in torch.randperm(len(data))[:count]])


def observe(model: nn.Module, images: Tensor) -> None:
    """Give the normalization layers the statistics of these images as their population statistics."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    model.eval()


def row(name: str, images: Tensor) -> str:
    """Measure one model."""
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {"num_classes": 2}
    plain: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    draw_norms(plain)
    observe(plain, images)
    model = bkn.convert(plain, images[:2], statistics_batch_size=None, input_prior=images)
    graph = find_hooks(model)[1].graph
    pooled = {
        layer
        for layer, number in graph.priors.items()
        if any(graph.nodes[i].operation in ("max_pool", "average") for i in graph.needed([number]))
    }
    cells = []
    for spatial.MAXIMUM_POWER, spatial.AVERAGE_POWER in POWERS.values():
        found = [r.analytic for r in bkn.prior_quality(model, images) if r.name in pooled and r.analytic is not None]
        mean = statistics.median(error.mean_error for error in found)
        variance = statistics.median(abs(error.log_variance_ratio) for error in found)
        cells.append(f"{mean:.2f}, {variance:.2f}")
    return f"| {name} | {len(pooled)} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
