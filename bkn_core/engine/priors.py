"""The quality of a run's priors: measured on its images, written as numbers and as a picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bkn_core.data.batches import normalize
from bkn_core.data.preprocess import Preprocess
from bkn_core.data.sources import choose
from bkn_core.data.splits import DataSplits, Images, ImageSet, prefetch
from bkn_core.engine.build import build_model
from bkn_core.engine.files import replacing, write_json
from bkn_core.engine.plots import new_figure, plain
from bkn_core.population import statistics
from bkn_core.priors.quality import PriorQuality, prior_quality
from bkn_core.recipe import Recipe
from bkn_core.recipe_words import printable

_LOOKS: dict[str, dict[str, Any]] = {
    "local": {"color": "tab:green", "marker": "^", "label": "closed form alone, from measured messages"},
    "analytic": {"color": "tab:orange", "marker": "s", "label": "without correction and innovation"},
    "refined": {"color": "tab:blue", "marker": "o", "label": "as the layer uses it"},
}
_INITIAL_IMAGES, _INITIAL_PIXELS = 256, 2**19  # seconds on the CPU, whatever the size of the images
_FACTORS = (1, 1.5, 0.5, 2, 3, 0.25, 4, 6, 0.1, 10, 0.03, 30, 0.01, 100, 1e-4, 1e4, 1e-8, 1e8, 1e-12, 1e12)
"""Marked where they fall within the picture and find room, the first before the others."""
_LONGEST = 80  # letters of a reason


@dataclasses.dataclass(frozen=True)
class PriorReport:
    """How well a trained model's priors predict what its layers see.

    Args:
        statistics: "population" or "batch": what the layers normalized by meanwhile.
        images: how many were looked at.
        rows: one for each layer, in the order in which they run.
        files: the numbers ("priors") and the picture ("priors_plot").
    """

    statistics: str
    images: int
    rows: tuple[PriorQuality, ...]
    files: dict[str, Path]

    def summary(self) -> dict[str, Any]:
        """Return names and numbers, without the channels."""
        layers = [row.summary() for row in self.rows]
        return {"statistics": self.statistics, "images": self.images, "layers": layers}


def report_priors(
    model: nn.Module,
    images: Images,
    preprocess: Preprocess,
    *,
    kind: str,
    device: torch.device,
    batch_size: int,
    files: dict[str, Path],
) -> PriorReport:
    """Measure the quality of a model's priors on images and write it as JSON and as a picture.

    Raises:
        ConversionError: the model has no Batch Kalman layers.
        OutputError: a file could not be written.
    """
    parts = torch.split(torch.arange(len(images)), batch_size)
    batches = (normalize(batch.to(device), preprocess) for batch, _ in prefetch(images, parts))
    with statistics(model, kind, 1):  # type: ignore[arg-type]
        rows = tuple(prior_quality(model, batches))
    report = PriorReport(kind, len(images), rows, files)
    write_json(files["priors"], report.summary())
    plot_prior_quality(rows, files["priors_plot"])
    return report


def initial_priors(recipe: Recipe, splits: DataSplits) -> list[PriorQuality]:
    """Measure the priors of a recipe's untrained model on a few training images, grouped as in training.

    There are no population statistics yet, so its layers normalize as in training. An error here is one of the closed
    form on this network and these images; none for pretrained models, whose weights are not fetched for this.
    """
    if recipe.norm.kind != "bkn" or recipe.model.pretrained:
        return []
    height, width = splits.preprocess.image_size
    count = min(max(_INITIAL_PIXELS // (height * width), 2 * recipe.batch.statistics), _INITIAL_IMAGES)
    chosen = choose(splits.train.labels, min(count, len(splits.train)))
    sample = ImageSet(splits.train.sample(chosen), splits.train.labels[chosen], splits.classes)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(recipe.train.seed)
        model = build_model(recipe, splits.preprocess, len(splits.classes), images=sample)
    with statistics(model, "batch", recipe.batch.statistics):
        return prior_quality(model, normalize(sample.images, splits.preprocess))


def plot_prior_quality(rows: Sequence[PriorQuality], path: str | Path) -> None:
    """Draw what each prior misses, layer under layer: medians and quartiles over channels, variance left, mean right.

    Raises:
        OutputError: the file could not be written.
    """
    figure = new_figure(figsize=(11, 1.9 + 0.34 * len(rows)), layout="constrained")
    variance, mean = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for shift, (kind, look) in zip((0.22, 0, -0.22), _LOOKS.items(), strict=True):
        errors = {i + shift: getattr(row, kind) for i, row in enumerate(rows) if getattr(row, kind) is not None}
        _draw(variance, {height: error.log_variance_ratios for height, error in errors.items()}, look)
        _draw(mean, {height: error.mean_errors for height, error in errors.items()}, look)
    for i, row in enumerate(rows):
        if i % 2:
            variance.axhspan(i - 0.5, i + 0.5, color="black", alpha=0.04, linewidth=0)
            mean.axhspan(i - 0.5, i + 0.5, color="black", alpha=0.04, linewidth=0)
        if row.refined is None:
            place = variance.get_yaxis_transform()
            words = plain(f"no prior: {printable(row.reason, _LONGEST)}")
            # Inside the axis, however long: a layout that makes room for it would leave none for the axis.
            variance.text(0.01, i, words, transform=place, color="gray", fontsize=9, clip_on=True, in_layout=False)
    variance.set_yticks(range(len(rows)), [plain(row.name) for row in rows])
    variance.set_ylim(len(rows) - 0.5, -0.5)
    _label(variance, mean)
    handles, labels = variance.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    with replacing(Path(path)) as aside:
        figure.savefig(aside, format="png", dpi=120)


def _label(variance: Any, mean: Any) -> None:
    variance.axvline(0, color="black", linewidth=1)
    low, high = variance.get_xlim()
    factors = variance.secondary_xaxis("top")
    marks: dict[float, str] = {}
    for place, factor in ((math.log(factor), factor) for factor in _FACTORS):
        if low <= place <= high and all(abs(place - other) > (high - low) / 18 for other in marks):
            marks[place] = f"{factor:g}"
    factors.set_xticks([*marks], [*marks.values()])
    factors.set_xlabel("observed / predicted variance")
    variance.set_xlabel("log(observed / predicted variance); right of 0 the prior is too small")
    mean.set_xlim(left=-0.02 * mean.get_xlim()[1])  # markers at 0 stay whole
    mean.set_xlabel("error of the mean in standard deviations")
    mean.set_title("medians and quartiles over channels", fontsize=9)
    for axis in (variance, mean):
        axis.grid(axis="x", alpha=0.25)


def _draw(axis: Any, values: dict[float, Tensor], look: dict[str, Any]) -> None:
    """Draw the median and the quartiles of the channels of each layer at its height."""
    known = {height: channels[channels.isfinite()] for height, channels in values.items()}
    known = {height: channels for height, channels in known.items() if len(channels)}
    if not known:
        return
    quartiles = [channels.quantile(channels.new_tensor([0.25, 0.5, 0.75])).tolist() for channels in known.values()]
    medians = [middle for _, middle, _ in quartiles]
    bars = [[middle - low for low, middle, _ in quartiles], [high - middle for _, middle, high in quartiles]]
    axis.errorbar(medians, list(known), xerr=bars, linestyle="none", markersize=5, elinewidth=1.4, alpha=0.9, **look)
