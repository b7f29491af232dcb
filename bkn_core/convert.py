"""Turn the batch normalization layers of a model into others, or into fixed affine maps: one walker, new models."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.baselines import with_baselines
from bkn_core.errors import ConversionError
from bkn_core.filter.kalman import Gaussian
from bkn_core.graph.graph import Graph, supported
from bkn_core.graph.input_moments import (
    input_modules,
    measure_input,
    reserve_input_moments,
)
from bkn_core.graph.operations import Interpreter, describe
from bkn_core.graph.trace import trace
from bkn_core.kinds import KINDS, Kind
from bkn_core.layers.arguments import check_gain
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.layers.factory import add_noise_, folded_layer, kalman_layer, plain_layer
from bkn_core.layers.rivals.reference import has_reference, settled
from bkn_core.layers.rivals.weights import bake_weights_
from bkn_core.layers.stale_optimizers import watched
from bkn_core.layers.surgery import check_replaceable, copied, is_frozen_norm, replaced, thawed
from bkn_core.priors.hooks import Message, PriorHooks, Transition, detach, find_hooks
from bkn_core.priors.named_layers import layer_of

Model = TypeVar("Model", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What a conversion did with one normalization layer.

    Args:
        name: its path in the model.
        channels: C.
        prior: what predicts its statistics, in words such as `relu(bn1) -> conv2`; None without a prior.
        reason: why it has none; "" with one.
    """

    name: str
    channels: int
    prior: str | None
    reason: str


@watched
@torch.inference_mode(mode=False)  # what is built there could never be trained
def convert(
    model: Model,
    example_input: Any,
    *,
    kind: Kind = "bkn",
    transition: Transition = "network",
    message: Message = "normalized",
    statistics_batch_size: int | None = 2,
    gain: float | Literal["auto"] = "auto",
    learn_gain: bool = True,
    correction: bool = False,
    innovation: bool = True,
    input_prior: Tensor | Iterable[Any] | None = None,
    covariance: Literal["diagonal", "full"] = "diagonal",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> Model:
    """Return a copy of a model whose batch normalization layers are of another kind; the model itself is untouched.

    Args:
        model: any model with `nn.BatchNorm*` layers, or a detector's frozen ones; what they learned is kept.
        example_input: a tensor, or a tuple or dict of the forward's arguments, for one forward that finds the graph.
        kind: "bkn", or a baseline: "bn", "brn", "gn", "ln", "in", "none", or one of docs/rivals.md.
        transition: "network" predicts through the model's own layers, "learned" through trained matrices (the paper).
        message: "normalized" predicts from (β, γ²), "raw" from the posterior of this forward.
        statistics_batch_size: images per statistics group; None is the whole batch.
        gain: "auto" computes it from the prior's error and the observation's noise, where there are innovations (else
            it is 0.1, or 0.02 for single images); a number is where it begins. 1.0 with learn_gain=False is batch
            normalization exactly.
        learn_gain: train the gain, where it is not computed.
        correction: a learned offset and scale of each network prior.
        innovation: move each network prior's mean and scale its variance by their running errors.
        input_prior: training images as the model sees them, a batch or batches, each a tensor or a tuple or dict as
            `example_input` may be; gives the layers that read the input an exact prior. Kind "reference" keeps the
            first 64 of the first batch; without it the example is the reference.
        covariance: "full" carries covariance matrices through learned transitions.
        include: name patterns of the layers to convert.
        exclude: name patterns of layers to leave as they are.

    Returns:
        The converted model. `conversion_report` says what each layer got.

    Raises:
        ConversionError: for arguments that do not exist or fit, or a model without batch normalization.
    """
    _check_model(model)
    network = transition == "network"
    gain = gain if gain != "auto" or (innovation and network) else 0.02 if statistics_batch_size == 1 else 0.1
    _check(kind, transition, message, gain, learn_gain)
    if is_converted(model):
        model = to_batch_norm(model)  # another conversion begins from what every conversion begins from
    chosen = _chosen(model, include, exclude)
    model = thawed(model, chosen)
    check_replaceable({name: model.get_submodule(name) for name in chosen})
    if kind != "bkn":
        return with_baselines(model, chosen, kind, example_input, (statistics_batch_size, input_prior))
    is_alone = gain == 1 and not learn_gain
    graph = Graph((), {}, dict.fromkeys(chosen, "the gain is 1")) if is_alone else trace(model, example_input)
    is_static = network and message == "normalized"
    graph = supported(graph, model, chosen, is_static=is_static, has_input_prior=input_prior is not None)
    features = {} if network else _previous_features(graph, model)

    def build(name: str, norm: _BatchNorm) -> nn.Module:
        has_prior = name in graph.priors
        return kalman_layer(
            norm,
            has_prior=has_prior,
            statistics_batch_size=statistics_batch_size,
            gain=gain if has_prior else 1.0,
            learn_gain=learn_gain and has_prior,
            correction=correction and has_prior and network,
            innovation=innovation and has_prior and network,
            previous_features=features.get(name),
            covariance=covariance,
            guarded=has_prior and not is_static,
        )

    converted = replaced(model, chosen, build)
    noise = f"{next(iter(features))}.transition_noise" if features else ""
    add_noise_([layer_of(converted, name) for name in features])
    if input_prior is not None:
        measure_input(converted, graph, input_prior)
    names = tuple(n for n, m in converted.named_modules() if isinstance(m, BatchKalmanNorm))
    PriorHooks(graph, transition, message, names, noise).attach(converted)
    return converted


def fold(model: Model) -> Model:
    """Return a copy in which every layer with population statistics is a fixed per-channel affine map.

        y = a x + c,   a = γ / sqrt(v + ε),   c = β - a m   (computed in float64)

    Args:
        model: a model with Batch Kalman, batch, renormalized or fixed normalization layers.

    Returns:
        The model in interpreter mode, without any of them and without the hooks of a conversion.

    Raises:
        ConversionError: for a layer that keeps no population statistics.
    """
    model = settled(model)
    names = {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    folded = replaced(model, names, folded_layer)
    detach(folded)
    bake_weights_(folded)
    return folded.eval()


@watched
def to_batch_norm(model: Model) -> Model:
    """Return a copy in which every Batch Kalman layer is the `nn.BatchNorm*` layer with its population statistics.

    Args:
        model: a model that `convert` returned.

    Returns:
        A plain model: nothing of this library is needed to load or use it.
    """
    model = settled(model)
    names = {name for name, module in model.named_modules() if isinstance(module, BatchKalmanNorm)}
    plain = replaced(model, names, plain_layer)
    detach(plain)
    return plain


def conversion_report(model: nn.Module) -> list[LayerReport]:
    """Say for each normalization layer of a converted model what predicts it, or why nothing does.

    Args:
        model: a model that `convert` returned (or a wrapper around it).

    Raises:
        ConversionError: for a model that was not converted.
    """
    root, hooks = find_hooks(model)
    graph = hooks.graph
    reports = []
    for name in [*graph.priors, *graph.reasons]:
        channels = int(root.get_submodule(name).num_features)  # type: ignore[arg-type]
        prior = describe(graph, graph.priors[name]) if name in graph.priors else None
        reports.append(LayerReport(name, channels, prior, graph.reasons.get(name, "")))
    order = {name: i for i, (name, _) in enumerate(root.named_modules())}
    return sorted(reports, key=lambda report: order[report.name])


def is_converted(model: nn.Module) -> bool:
    """Whether anything that a conversion put into a model is still there."""
    if any(has_reference(module) for module in model.modules()):
        return True
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    layers = (module for module in model.modules() if isinstance(module, BatchKalmanNorm))
    return next(layers, None) is not None or any(isinstance(hook, PriorHooks) for hook in hooks)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ConversionError(f"the model is a {type(model).__name__}", "Give an nn.Module, made and not its class.")


def _check(kind: str, transition: str, message: str, gain: float | str, learn_gain: bool) -> None:
    allowed = {
        "kind": (kind, KINDS),
        "transition": (transition, ("network", "learned")),
        "message": (message, ("normalized", "raw")),
    }
    for name, (value, choices) in allowed.items():
        if value not in choices:
            raise ConversionError(f"{name} is {value!r}", f"Choose one of {', '.join(choices)}.")
    if gain != "auto":
        check_gain(gain, learn_gain and kind == "bkn")


def _chosen(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> set[str]:
    norms = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm) or is_frozen_norm(m)]
    if not norms:
        raise ConversionError(
            f"{type(model).__name__} has no batch normalization layer to convert", "Build the model with nn.BatchNorm*."
        )

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, p) for p in ([patterns] if isinstance(patterns, str) else patterns))

    chosen = {name for name in norms if matches(name, include) and not matches(name, exclude)}
    if not chosen:
        raise ConversionError(
            f"include={tuple(include)} and exclude={tuple(exclude)} leave none of {len(norms)} layers",
            f"Names look like {norms[0]!r}.",
        )
    return chosen


def _previous_features(graph: Graph, model: nn.Module) -> dict[str, int]:
    """Count the channels that feed each learned transition, by a trial run on zeros."""

    def zeros(name: str) -> Gaussian:
        count = int(model.get_submodule(name).num_features)  # type: ignore[arg-type]
        return Gaussian(torch.zeros(1, count), torch.zeros(1, count))

    replica = copied(model)
    for name in input_modules(graph):
        reserve_input_moments(replica.get_submodule(name))
    interpreter = Interpreter(graph, replica, zeros, is_joined=True)
    return {name: interpreter.node(number).mean.shape[-1] for name, number in graph.priors.items()}
