"""How well the priors of a converted model predict what its layers see: measured, layer by layer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from bkn_core.errors import ConversionError, StatisticsError
from bkn_core.filter.kalman import Gaussian, diagonal
from bkn_core.filter.uncertainty import Uncertainty
from bkn_core.graph.entry import entered
from bkn_core.graph.operations import describe
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.priors.hooks import PriorHooks, find_hooks
from bkn_core.priors.named_layers import layer_of, norm_of, normalized_message

Batches = Tensor | Iterable[Tensor | Sequence[Any] | dict[str, Any]]
ERRORS = ("refined", "analytic", "local")


@dataclasses.dataclass(frozen=True, eq=False)
class PriorError:
    """By how much one prior misses the moments (µ, v) of what its layer reads, channel by channel, in float64.

    Args:
        mean_errors: |µ' - µ| / sqrt(v + ε), (C,).
        log_variance_ratios: log( (v + ε) / (v' + ε) ), (C,); above 0 where the prior is too small.
    """

    mean_errors: Tensor
    log_variance_ratios: Tensor

    @property
    def mean_error(self) -> float:
        """The error of the mean in observed standard deviations, averaged over channels."""
        return self.mean_errors.mean().item()

    @property
    def log_variance_ratio(self) -> float:
        """The log ratio of observed to predicted variance, averaged over channels."""
        return self.log_variance_ratios.mean().item()

    @property
    def spread(self) -> float:
        """The standard deviation of the log variance ratio over channels."""
        return self.log_variance_ratios.std(correction=0).item()

    def summary(self) -> dict[str, float]:
        """Return the three numbers, without the channels."""
        return {name: getattr(self, name) for name in ("mean_error", "log_variance_ratio", "spread")}


@dataclasses.dataclass(frozen=True)
class GainQuality:
    """What a layer knew, when its training ended, of its prior's error P and of an observation's noise R.

        q = P / (P + R)

    Args:
        error: P of mean and variance, relative to the observed variance and its square (`norm/uncertainty.py`).
        noise: R of mean and variance, likewise.
        implied: q of mean and variance.
        used: the gain that the layer blends by, its schedule included.
    """

    error: tuple[float, float]
    noise: tuple[float, float]
    implied: tuple[float, float]
    used: float

    def summary(self) -> dict[str, Any]:
        """Return the numbers as JSON holds them."""
        numbers = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in numbers.items()}


@dataclasses.dataclass(frozen=True)
class PriorQuality:
    """The prior of one normalization layer beside what the layer saw.

    Args:
        name: its path in the model.
        channels: C.
        prior: what predicts its statistics, in words such as `relu(bn1) -> conv2`; None without a prior.
        reason: why nothing was compared; "" where it was.
        refined: the error of the prior that the layer uses, correction and inflation included.
        analytic: the error of the prior without them.
        local: the error that remains of the analytic one when the measured moments of the preceding layers take the
            place of their messages: that of the closed form alone, without what it inherits.
        gain: how uncertain prior and observation were in training, and the gain; None where the layer keeps no record.
    """

    name: str
    channels: int
    prior: str | None
    reason: str
    refined: PriorError | None
    analytic: PriorError | None
    local: PriorError | None
    gain: GainQuality | None = None

    def summary(self) -> dict[str, Any]:
        """Return names and numbers, without the channels."""
        errors = {kind: getattr(self, kind) for kind in ERRORS}
        known = {field: getattr(self, field) for field in ("name", "channels", "prior", "reason")}
        known["gain"] = None if self.gain is None else self.gain.summary()
        return known | {kind: None if error is None else error.summary() for kind, error in errors.items()}


@torch.no_grad()
def prior_quality(model: nn.Module, images: Batches) -> list[PriorQuality]:
    """Compare the prior of each normalization layer with the moments of what the layer reads.

    The model runs once over the images in interpreter mode, so that every layer sees what it will see in use, and the
    moments are those of each layer's input over all images and positions: what is observed, not the posterior. Inside
    `statistics(model, "batch", s)` layers normalize by that. Where a message depends on the forward (raw messages,
    learned transitions) the population statistics of the preceding layers take its place.

    Args:
        model: a model that `convert` returned (or a wrapper around it); it is left as it was.
        images: a batch as the model sees it, or batches of them, alone or first in a pair as a loader gives them, or
            a tuple that begins with something else than a tensor, or a dict, of all that the forward takes.

    Returns:
        A row for each normalization layer, in the order in which they run; layers without a prior have no errors.

    Raises:
        ConversionError: for a model that was not converted, or without any image.
        StatisticsError: a message needs population statistics that its layer does not keep.
    """
    root, hooks = find_hooks(model)
    device = layer_of(root, hooks.names[0]).gain_factor.device
    norms = {name: module for name, module in root.named_modules() if isinstance(module, _BatchNorm)}
    with _observing(model, norms) as seen:
        for batch in [images] if isinstance(images, Tensor) else images:
            inputs = batch if isinstance(batch, Tensor | dict) or not isinstance(batch[0], Tensor) else batch[0]
            if len(inputs):
                entered(model, pytree.tree_map_only(Tensor, lambda t: t.to(device), inputs), "a batch")
    if not seen:
        raise ConversionError("prior_quality was given no image", "Give a batch of images as the model sees them.")
    with torch.autocast(device.type, enabled=False):
        errors = _errors(root, hooks, seen)
    graph = hooks.graph
    rows = []
    for name in [*seen, *(name for name in norms if name not in seen)]:
        prior = describe(graph, graph.priors[name]) if name in graph.priors else None
        unseen = "" if name in errors else "the images do not reach it"
        reason = unseen if prior else graph.reasons.get(name, "it was not converted")
        refined, analytic, local = errors.get(name, (None, None, None))
        gain, channels = gain_quality(norms[name]), norms[name].num_features
        rows.append(PriorQuality(name, channels, prior, reason, refined, analytic, local, gain))
    return rows


def gain_quality(layer: nn.Module) -> GainQuality | None:
    """Return P, R and the gains of a layer, None where it keeps no record of them or has not been trained."""
    state = getattr(layer, "uncertainty", None)
    if not isinstance(layer, BatchKalmanNorm) or state is None or not state[0]:
        return None
    known = Uncertainty.of(state.cpu().double())
    error, noise, implied = (tuple(values.tolist()) for values in (known.error, known.noise, known.gains))
    return GainQuality(error, noise, implied, float(layer.gain))


def _errors(root: nn.Module, hooks: PriorHooks, seen: _Seen) -> dict[str, tuple[PriorError, PriorError, PriorError]]:
    """Return the errors, in the order of `ERRORS`, of each layer that has a prior and was reached."""

    def message(name: str) -> Gaussian:
        return known_message(root, hooks, name)

    def measured(name: str) -> Gaussian:
        if name not in seen:
            return message(name)
        known = seen[name][hooks.is_static]
        like = message(name).mean
        return Gaussian(*(values.to(like).view_as(like) for values in known.moments()))

    analytic, local = (hooks.analytic_priors(root, leaf) for leaf in (message, measured))
    errors = {}
    for name in analytic.keys() & seen.keys():
        layer, observed = layer_of(root, name), seen[name][0].moments()
        priors = (layer.refine(analytic[name]), analytic[name], local[name])
        errors[name] = tuple(_error(prior, observed, layer.eps) for prior in priors)
    return errors  # type: ignore[return-value]


def known_message(root: nn.Module, hooks: PriorHooks, name: str) -> Gaussian:
    """Return what a layer sends without any forward: (β, γ²), or its population statistics where it sends them raw.

    Raises:
        StatisticsError: it keeps none.
    """
    norm = norm_of(root, name)
    if hooks.is_static:
        return normalized_message(norm)
    if norm.running_mean is None or norm.running_var is None:
        raise StatisticsError(
            f"{name} keeps no population statistics for the priors of other layers",
            "Use message='normalized', or track_running_stats=True.",
        )
    wide = torch.promote_types(norm.running_mean.dtype, torch.float32)
    return Gaussian(norm.running_mean[None].to(wide), norm.running_var[None].to(wide))


def _error(prior: Gaussian, observed: Gaussian, eps: float) -> PriorError:
    mean, variance = (values.cpu().double().flatten() for values in diagonal(prior))
    spread = observed.variance + eps
    return PriorError((mean - observed.mean).abs() / spread.sqrt(), spread.log() - (variance + eps).log())


@contextlib.contextmanager
def _observing(model: nn.Module, norms: dict[str, _BatchNorm]) -> Iterator[_Seen]:
    """Put a model in interpreter mode for a while and observe its layers in the order in which they run."""
    seen: _Seen = {}
    training = [(module, module.training) for module in model.modules()]

    def observing(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def observe(_: nn.Module, arguments: Any, result: Tensor) -> None:
            for sums, values in zip(seen.setdefault(name, (_Sums(), _Sums())), (arguments[0], result), strict=True):
                sums.add(values)

        return observe

    handles = [module.register_forward_hook(observing(name)) for name, module in norms.items()]
    try:
        model.eval()
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training:
            module.training = flag


class _Sums:
    """Mean and biased variance per channel over all images and positions, merged batch by batch in float64."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor) -> None:
        wide = torch.float32 if x.device.type == "mps" else torch.float64  # Metal has no float64
        dimensions = [i for i in range(x.dim()) if i != 1]
        variance, mean = (v.cpu().double() for v in torch.var_mean(x.to(wide), dimensions, correction=0))
        count = x.numel() // x.shape[1]
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self.squares = self.squares + count * variance + difference.square() * (self.count * count / total)
        self.count = total

    def moments(self) -> Gaussian:
        return Gaussian(self.mean, self.squares / self.count)


_Seen = dict[str, tuple[_Sums, _Sums]]  # what each layer reads, and what it gives
