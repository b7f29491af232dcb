"""Which rule of the closed form costs a prior how much: log variance ratios, layer by layer, of a trained run.

    python benchmarks/prior_rules.py RUN [--images 1000]

For each convolution before a normalization layer, the mean over its output channels of the log of

    messages     variance with measured moments of the preceding layers / with the messages that they send
    activations  variance with the measured moments of the convolution's input / with those predicted from the former
    padding      variance with the zero padding in the patches / without it
    taps         variance with the correlation of the taps of a channel / without it
    channels     variance with the correlation of channels at the same tap / without it
    all          variance with all correlations in the patches, which is the observed one / without any

"activations" holds activations and additions of branches. Taps and channels overlap, so they do not sum to "all".
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from bkn_core.data.batches import normalize
from bkn_core.data.splits import load_test_images
from bkn_core.engine.checkpoint import load_weights, weights_path
from bkn_core.filter import propagate
from bkn_core.filter.kalman import Gaussian
from bkn_core.graph.input_moments import _patches
from bkn_core.graph.operations import Interpreter
from bkn_core.priors.hooks import find_hooks
from bkn_core.priors.quality import known_message

COLUMNS = ("messages", "activations", "padding", "taps", "channels", "all")


class Moments:
    """Mean and covariance of rows, added up in float64."""

    def __init__(self) -> None:
        self.count, self.first, self.second = 0, torch.zeros(()), torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Add rows (n, d)."""
        rows = rows.double()
        self.count += len(rows)
        self.first, self.second = self.first + rows.sum(0), self.second + rows.T @ rows

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Return (d,) and (d, d)."""
        mean = self.first / self.count
        return mean, self.second / self.count - torch.outer(mean, mean)

    def gaussian(self) -> Gaussian:
        """Return the mean and the variances."""
        mean, covariance = self.mean_and_covariance()
        return Gaussian(mean, covariance.diagonal())


def channels_last_rows(x: Tensor) -> Tensor:
    """Lay out an activation as (positions, C)."""
    return x.movedim(1, -1).flatten(0, -2)


def observe(module: nn.Module, arguments: tuple[Tensor], result: Tensor, *, found: dict[str, Moments]) -> None:
    """Add what a convolution reads, whole and as patches, or what a normalization layer gives."""
    if isinstance(module, nn.Conv2d):
        found["patches"].add(_patches(module, arguments[0]))
        found["input"].add(channels_last_rows(arguments[0]))
    else:
        found["output"].add(channels_last_rows(result))


def log_ratio(first: Tensor, second: Tensor) -> float:
    """Return the mean of log(first / second)."""
    return (first.double().log() - second.double().log()).mean().item()


def correlations(module: nn.Module, patches: Moments) -> dict[str, Tensor]:
    """Return the output variance of a convolution with some of the correlations in its patches."""
    weight = module.weight.detach().double()
    taps, channels = weight[0, 0].numel(), weight.shape[1]
    covariance, rows = patches.mean_and_covariance()[1], weight.flatten(1)
    masks = {
        "none": torch.eye(taps * channels),
        "taps": torch.block_diag(*[torch.ones(taps, taps)] * channels),
        "channels": torch.eye(taps).repeat(channels, channels),
        "all": torch.ones(taps * channels, taps * channels),
    }
    return {name: ((rows @ (covariance * mask)) * rows).sum(1) for name, mask in masks.items()}


def decompose(model: nn.Module, batches: list[Tensor]) -> dict[str, dict[str, float]]:
    """Return the columns of each layer whose prior ends in an ungrouped convolution."""
    root, hooks = find_hooks(model)
    graph = hooks.graph
    last = {name: graph.nodes[number] for name, number in graph.priors.items()}
    ends = {n: node.name.rsplit(".", 1)[0] for n, node in last.items() if node.operation == "convolution"}
    found: dict[str, dict[str, Moments]] = {}
    for name in {*hooks.names, *ends.values()}:
        found[name] = {kind: Moments() for kind in ("patches", "input", "output")}
        root.get_submodule(name).register_forward_hook(functools.partial(observe, found=found[name]))
    for batch in batches:
        model(batch)

    def measured(name: str) -> Gaussian:
        return Gaussian(*(values.float() for values in found[name]["output"].gaussian()))

    sent = Interpreter(graph, root, functools.partial(known_message, root, hooks))
    seen = Interpreter(graph, root, measured)
    table = {}
    for name, path in ends.items():
        module = root.get_submodule(path)
        read = Gaussian(*(values.float() for values in found[path]["input"].gaussian()))
        plain = propagate.convolution(read, module.weight, None, 1).variance
        exact = correlations(module, found[path]["patches"])
        number = graph.priors[name]
        ratios = (
            log_ratio(seen.node(number).variance, sent.node(number).variance),
            log_ratio(plain, seen.node(number).variance),
            log_ratio(exact["none"], plain),
            *(log_ratio(exact[kind], exact["none"]) for kind in ("taps", "channels", "all")),
        )
        table[name] = dict(zip(COLUMNS, ratios, strict=True))
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    weights = load_weights(weights_path(options.run))
    data = weights.recipe.data
    images, _ = load_test_images(data.name, root=data.root, preprocess=weights.preprocess, test_images=options.images)
    parts = torch.arange(len(images)).split(100)
    with torch.no_grad():
        table = decompose(weights.model(), [normalize(images.batch(part)[0], weights.preprocess) for part in parts])
    print(f"{'layer':24}" + "".join(f"{name:>12}" for name in COLUMNS))
    for name, row in table.items():
        print(f"{name:24}" + "".join(f"{row[column]:12.2f}" for column in COLUMNS))


if __name__ == "__main__":
    main()
