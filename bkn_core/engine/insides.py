"""What a trained run shows inside: gains and priors of its layers, and the variances that micro-batches show of one.

Measured on a few test images on the CPU, once: the run's folder keeps it, with the digest of the weights it is of.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.data.batches import normalize
from bkn_core.data.sources import choose
from bkn_core.data.splits import load_test_images
from bkn_core.engine.checkpoint import Weights, load_weights, weights_path
from bkn_core.engine.files import read_bytes, write_json
from bkn_core.engine.tensor_files import opened
from bkn_core.engine.trust import may_choose
from bkn_core.errors import BknError, InputError, OutputError
from bkn_core.filter.state import FilterStatistics
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.population import statistics
from bkn_core.priors.quality import gain_quality, prior_quality

_NAME = "insides.json"
_PIXELS, _LEAST, _MOST = 2**19, 4, 32  # of the images together; statistics groups
_CHANNELS = 64  # more cannot be told apart in a picture


class _Numbers(BaseModel):
    model_config = ConfigDict(frozen=True)


class Gains(_Numbers):
    """The gain that a layer blends by, and those of mean and variance that its uncertainty implies."""

    name: str
    used: float
    implied: tuple[float, float] | None


class PriorMiss(_Numbers):
    """By how much the prior that a layer uses misses what the layer reads, and the analytic one without refinement.

    Each is (error of the mean, log variance ratio, its spread over channels), see `bkn_core.priors.quality`.
    """

    name: str
    prior: str
    refined: tuple[float | None, float | None, float | None]
    analytic: tuple[float | None, float | None, float | None]


class Variances(_Numbers):
    """The variance of each channel of one layer in single statistics groups, beside the moving one.

    Args:
        layer: its path in the model.
        statistics: images of a group.
        moving: the moving variance, (channels,).
        observed: that of what the layer reads, (groups, channels).
        used: the posterior's that the layer normalizes by, likewise; empty where that is the observed one.
    """

    layer: str
    statistics: int
    moving: list[float | None]
    observed: list[list[float | None]]
    used: list[list[float | None]]


class Insides(_Numbers):
    """What a run shows inside.

    Args:
        digest: of the weights.
        images: how many were looked at; 0 where the data were not there.
        gains: of the Batch Kalman layers.
        priors: of those that have one.
        variances: None where no layer keeps a moving variance.
    """

    digest: str
    images: int
    gains: list[Gains]
    priors: list[PriorMiss]
    variances: Variances | None


def look_inside(run: Path, *, measure: bool, trusted: bool) -> Insides | None:
    """Return what a run shows inside: as its folder keeps it, else measured now and kept there.

    Args:
        run: its folder.
        measure: False returns None where the folder keeps nothing.
        trusted: whether the data that the run names may lie outside the working folder.

    Returns:
        None also for a run without readable weights.
    """
    try:
        source = weights_path(run)
        with opened(source, "") as (_, metadata):
            known = _kept(run / _NAME, metadata.get("digest", ""))
        if (known is not None and known.images) or not measure:
            return known
        weights = load_weights(source)
        with torch.random.fork_rng(devices=()), torch.no_grad():
            found = _look(weights, _images(weights, trusted=trusted))
    except BknError:
        return None
    with contextlib.suppress(OutputError):  # a run that is only read is looked at again next time
        write_json(run / _NAME, found.model_dump())
    return found


def _kept(path: Path, digest: str) -> Insides | None:
    try:
        known = Insides.model_validate_json(read_bytes(path))
    except (InputError, ValidationError):
        return None
    return known if known.digest == digest else None


def _images(weights: Weights, *, trusted: bool) -> Tensor | None:
    """Return a few test images as the model sees them, None where they cannot be had."""
    data = weights.recipe.data
    if not trusted and not may_choose(data):
        return None
    height, width = weights.preprocess.image_size
    size = weights.recipe.batch.statistics
    groups = max(_LEAST, min(_MOST, _PIXELS // (height * width * size)))
    try:
        images, _ = load_test_images(
            data.name, root=data.root, preprocess=weights.preprocess, test_images=data.test_images
        )
    except BknError:
        return None
    count = min(groups * size, len(images) // size * size)
    chosen = choose(images.labels, count)
    mixed = chosen[torch.randperm(count, generator=torch.Generator().manual_seed(0))]  # groups of all classes
    return normalize(images.sample(mixed), weights.preprocess) if count else None


def _look(weights: Weights, images: Tensor | None) -> Insides:
    model = weights.model()
    is_kalman = weights.recipe.norm.kind == "bkn"
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BatchKalmanNorm) and is_kalman}
    gains = []
    for name, layer in layers.items():
        known = gain_quality(layer)
        gains.append(Gains(name=name, used=float(layer.gain), implied=None if known is None else known.implied))
    priors, variances = [], None
    if images is not None:
        with contextlib.suppress(BknError):
            variances = _variances(model, images, weights.recipe.batch.statistics, is_kalman=is_kalman)
        with contextlib.suppress(BknError), statistics(model, "population"):
            priors = _misses(model, images) if layers else []
    count = 0 if images is None else len(images)
    return Insides(digest=weights.digest, images=count, gains=gains, priors=priors, variances=variances)


def _misses(model: nn.Module, images: Tensor) -> list[PriorMiss]:
    misses = []
    for row in prior_quality(model, images):
        if row.prior is None or row.refined is None or row.analytic is None:
            continue
        refined, analytic = (
            (error.mean_error, error.log_variance_ratio, error.spread) for error in (row.refined, row.analytic)
        )
        misses.append(PriorMiss(name=row.name, prior=row.prior, refined=refined, analytic=analytic))
    return misses


@dataclasses.dataclass
class _Seen:
    """What a forward shows of one layer: its input, and the posterior of each group where it makes one."""

    size: int
    observed: Tensor | None = None
    used: Tensor | None = None

    def read(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0]
        if len(x) % self.size:  # other images go along, those of a reference batch
            return
        groups = x.reshape(-1, self.size, x.shape[1], x[0, 0].numel())
        self.observed = groups.double().var((1, 3), correction=0)

    def keep(self, found: FilterStatistics, share: Tensor | None, images: int) -> None:
        self.used = found.variance


def _variances(model: nn.Module, images: Tensor, size: int, *, is_kalman: bool) -> Variances | None:
    """Run a model in groups of training's size and return what the layer in its middle shows, None without any."""
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_var is not None
    ]
    if not layers:
        return None
    name, layer = layers[len(layers) // 2]
    seen = _Seen(size)
    with _watched(layer, seen), statistics(model, "batch", size):
        model.eval()(images)
    if seen.observed is None or layer.running_var is None:
        return None
    used = None if seen.used is None else seen.used.double().expand_as(seen.observed)
    return Variances(
        layer=name,
        statistics=size,
        moving=layer.running_var[:_CHANNELS].tolist(),
        observed=seen.observed[:, :_CHANNELS].tolist(),
        used=used[:, :_CHANNELS].tolist() if used is not None and is_kalman else [],
    )


@contextlib.contextmanager
def _watched(layer: nn.Module, seen: _Seen) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(seen.read)
    if isinstance(layer, BatchKalmanNorm):
        layer.on_posterior = seen.keep
    try:
        yield
    finally:
        handle.remove()
        if isinstance(layer, BatchKalmanNorm):
            layer.on_posterior = None
