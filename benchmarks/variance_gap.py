"""How far the moving statistics of a run are from those of its training images, layer by layer, and what it costs.

    python benchmarks/variance_gap.py RUN [RUN ...] [--images 2000] [--out variance_gap.png]

Each training image is forwarded once with fixed weights, in drawn groups of the training's size, and the
statistics that normalize are averaged (`bkn.estimate_population`). The gap of a layer is the mean over its channels of
|log(moving variance / averaged variance)|, and of |moving mean - averaged mean| in standard deviations. Then top-1 on
the test images with the mean and the variance each of the population or of groups, as `bkn eval --stats mixtures`.
Runs with `norm.kind` bkn or bn.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import bkn_core as bkn
from bkn_core.data.batches import epoch_order, normalize
from bkn_core.engine.build import load_splits
from bkn_core.engine.checkpoint import load_weights, weights_path
from bkn_core.engine.evaluation import measure_model, modes
from bkn_core.engine.tasks.named import task_of
from bkn_core.layers.batch_kalman import BatchKalmanNorm

Gaps = dict[str, tuple[float, float]]  # by layer: of the variance, of the mean
BATCH = 128  # images of a forward, or the next multiple of the group


def layers_of(model: nn.Module) -> dict[str, BatchKalmanNorm]:
    """Return the layers that have moving statistics, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BatchKalmanNorm)}


def gaps(model: nn.Module, batches: list[Tensor]) -> Gaps:
    """Compare the moving statistics of each layer with those of all images."""
    forwarded = copy.deepcopy(model)
    bkn.estimate_population(forwarded, batches)
    found = {}
    for (name, moving), layer in zip(layers_of(model).items(), layers_of(forwarded).values(), strict=True):
        ratio = ((moving.running_var + moving.eps) / (layer.running_var + layer.eps)).log()
        shift = (moving.running_mean - layer.running_mean) / (layer.running_var + layer.eps).sqrt()
        found[name] = ratio.abs().mean().item(), shift.abs().mean().item()
    return found


def draw(runs: dict[str, Gaps], path: Path) -> None:
    """Draw the gap of the variance over the layers, a line for each run."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for name, rows in runs.items():
        axis.plot(range(1, len(rows) + 1), [variance for variance, _ in rows.values()], marker=".", label=name)
    axis.set(xlabel="normalization layer", ylabel="|log(moving / forwarded variance)|", title="Variance gap")
    axis.legend()
    figure.savefig(path)


def main() -> None:
    """Print both tables of each run, and draw the gaps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--images", type=int, help="training images that are forwarded; default all")
    parser.add_argument("--out", type=Path, default=Path("variance_gap.png"))
    options, drawn = parser.parse_args(), {}
    for run in options.runs:
        weights = load_weights(weights_path(run))
        splits, size = load_splits(weights.recipe), weights.recipe.batch.statistics
        model, batch = weights.model().eval(), -(-BATCH // size) * size
        count = len(splits.train) if options.images is None else min(options.images, len(splits.train))
        parts = epoch_order(len(splits.train), 0, 0)[:count].split(batch)
        drawn[run.name] = gaps(model, [normalize(splits.train.batch(part)[0], weights.preprocess) for part in parts])
        print(f"{run}: {count} training images in groups of {size}")
        for name, (variance, mean) in drawn[run.name].items():
            print(f"  {name:32} variance {variance:.4f}  mean {mean:.4f}")
        how = {"device": torch.device("cpu"), "batch_size": batch, "statistics_batch_size": size}
        how["task"] = task_of(weights.recipe)
        for kind in modes("mixtures"):
            measured = measure_model(model, splits.test, weights.preprocess, kind=kind, **how)
            print(f"  {kind:32} top-1 {100 * measured.top1:.2f} %")
    draw(drawn, options.out)
    print(f"drawn: {options.out}")


if __name__ == "__main__":
    main()
