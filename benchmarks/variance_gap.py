"""How far the moving statistics of a run are from those of its training images, layer by layer, and what it costs.

    python benchmarks/variance_gap.py RUN [RUN ...] [--images 2000] [--out variance_gap.png]

Each training image is forwarded once with fixed weights, in groups of the training's size, and the statistics that
normalize are averaged (`bkn.estimate_population`). The gap of a layer is the mean over its channels of
|log(moving variance / averaged variance)|, and of |moving mean - averaged mean| in standard deviations. Then top-1 on
the test images with the mean and the variance each from the moving statistics or from groups of the training's size.
Runs with `norm.kind` bkn or bn.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import bkn_core as bkn
from bkn_core.engine.batches import normalize
from bkn_core.engine.build import load_splits
from bkn_core.engine.checkpoint import Weights, load_weights, weights_path
from bkn_core.engine.evaluation import measure
from bkn_core.filter.kalman import Gaussian, spread_over_images
from bkn_core.filter.kalman import normalize as by_rows
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


@contextlib.contextmanager
def mixed(model: nn.Module, mean: str, variance: str, size: int) -> Iterator[None]:
    """Let layers normalize by the mean and the variance of "moving" or of "batch" statistics each."""
    handles, layers = [], layers_of(model).values()
    for layer in layers:
        held: list[Gaussian] = []
        layer.on_posterior = lambda posterior, share, images, held=held: held.append(posterior)

        def chosen(layer: Any, inputs: tuple[Tensor], _: Tensor, held: list[Gaussian]) -> Tensor:
            group, (x,) = held.pop(), inputs
            rows = [
                moving.expand_as(own) if kind == "moving" else own
                for kind, moving, own in (
                    (mean, layer.running_mean, group.mean),
                    (variance, layer.running_var, group.variance),
                )
            ]
            spread = Gaussian(*(spread_over_images(values, len(x), size) for values in rows))
            return by_rows(x, spread, layer.weight, layer.bias, layer.eps)

        handles.append(layer.register_forward_hook(partial(chosen, held=held)))
    try:
        with bkn.statistics(model, "batch", size):
            yield
    finally:
        for handle, layer in zip(handles, layers, strict=True):
            handle.remove()
            layer.on_posterior = None


def accuracies(model: nn.Module, weights: Weights, images: Any, size: int, batch: int) -> dict[tuple[str, str], float]:
    """Measure top-1 with each pair of mean and variance."""
    found = {}
    for mean, variance in itertools.product(("moving", "batch"), repeat=2):
        with mixed(model, mean, variance, size), torch.inference_mode():
            measured = measure(lambda part: model(normalize(part, weights.preprocess)), images, batch_size=batch)
        found[mean, variance] = measured.top1
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
        parts = torch.arange(count).split(batch)
        drawn[run.name] = gaps(model, [normalize(splits.train.batch(part)[0], weights.preprocess) for part in parts])
        print(f"{run}: {count} training images in groups of {size}")
        for name, (variance, mean) in drawn[run.name].items():
            print(f"  {name:32} variance {variance:.4f}  mean {mean:.4f}")
        for (mean_kind, variance_kind), top1 in accuracies(model, weights, splits.test, size, batch).items():
            print(f"  mean {mean_kind:6} variance {variance_kind:6} top-1 {100 * top1:.2f} %")
    draw(drawn, options.out)
    print(f"drawn: {options.out}")


if __name__ == "__main__":
    main()
