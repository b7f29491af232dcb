"""Hand every normalization layer of a model its prior at each forward: a root hook that holds names, no tensors."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bkn_core.errors import ConversionError
from bkn_core.filter.kalman import Gaussian, diagonal, predict
from bkn_core.filter.state import Observation
from bkn_core.graph.graph import Graph
from bkn_core.graph.input_moments import remove_input_moments
from bkn_core.graph.interpret import RULES, STRUCTURE, Interpreter, parameter
from bkn_core.graph.lookup import Lookup
from bkn_core.graph.lower import LoweredGraph, kind_for
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.layers.forward import LayerContext, is_recomputation
from bkn_core.layers.loading import explain
from bkn_core.ops.track import track
from bkn_core.priors.named_layers import checked, gains_of, layer_of, no_autocast, norm_of, normalized_message, refine
from bkn_core.priors.shared import Shared, SharedRow

Transition = Literal["learned", "network"]
Message = Literal["normalized", "raw"]


@dataclasses.dataclass
class PriorHooks:
    """The forward hooks of a converted model.

    With normalized messages a prior depends on parameters only: all are computed once, before the forward. With raw
    messages and learned transitions a layer's prior depends on this forward's posteriors, so it is computed when the
    layer runs, from the posteriors of those that ran before it.

    Args:
        graph: which layers feed which.
        transition: "network" or "learned".
        message: "normalized" or "raw"; learned transitions always send the raw posterior.
        noise: path of the parameter of r, shared by all learned transitions; "" without any.
        names: the Batch Kalman Normalization layers, in forward order.
    """

    graph: Graph
    transition: Transition
    message: Message
    names: tuple[str, ...]
    noise: str = ""
    lowered: LoweredGraph | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.lookup = Lookup(self.names)
        self.shared: Shared | None = None  # inside `accumulation`
        self.row: SharedRow | None = None  # of its last block

    def __getstate__(self) -> dict[str, Any]:
        """Copies are outside every block."""
        return {**self.__dict__, "shared": None, "row": None}

    def attach(self, model: nn.Module) -> None:
        """Register the hooks on the model."""
        model.register_forward_pre_hook(self)
        model.register_forward_hook(self.close_forward, always_call=True)
        model.register_load_state_dict_post_hook(explain)  # type: ignore[no-untyped-call]

    @property
    def is_static(self) -> bool:
        """Whether priors depend on parameters only."""
        return self.transition == "network" and self.message == "normalized"

    def __call__(self, model: nn.Module, arguments: Any = None) -> None:
        """Open the contexts of the forward that begins."""
        layers = self.layers(model)
        if not any(layer.uses_batch_statistics for layer in layers):
            return
        observations: list[Observation] = []
        contexts: list[LayerContext]
        if self.shared is not None and not torch.compiler.is_compiling() and self.shared.serves_now():
            contexts = self.shared.contexts(observations, self.names)
        elif self.is_static:
            priors, gains = self.predictions(model, layers)
            contexts = [
                LayerContext(observations, priors.get(name), gain, self._renewal(model, name, gain))
                for name, gain in zip(self.names, gains, strict=True)
            ]
        else:
            posteriors = _Posteriors(self, model)
            contexts = [_PosteriorContext(observations, posteriors, name) for name in self.names]
        for layer, context in zip(layers, contexts, strict=True):
            layer.enter(context)

    def close_forward(self, model: nn.Module, *_: Any) -> None:
        """Move what the layers remember and close their contexts.

        A layer called on its own afterwards does not use that forward's prior, which stays readable for recomputation
        in the backward pass.
        """
        observations: list[Observation] = []
        try:
            layers = self.lookup(model)
        except ConversionError:  # a changed model has been refused before
            return
        for layer in layers:
            slot = layer.slots.own if isinstance(layer, BatchKalmanNorm) else None
            if slot is not None and slot.is_open and slot.context is not None:
                slot.is_open, observations = False, slot.context.observations
        if self.shared is None:
            track(observations)
        else:
            self.shared.keep(observations)
        observations.clear()  # or the layers, which hold their context, would hold themselves

    def layers(self, model: nn.Module) -> list[BatchKalmanNorm]:
        """Return the layers in the order of their names."""
        return [checked(layer, name) for layer, name in zip(self.lookup(model), self.names, strict=True)]

    def _renewal(self, model: nn.Module, name: str, present: Tensor) -> Callable[[], LayerContext] | None:
        """Return how to compute one layer's prior and gain on their own, as reentrant checkpoints need them."""
        if torch.compiler.is_compiling():
            return None
        found = weakref.ref(model)  # so that a model that is dropped goes at once

        def renew() -> LayerContext:
            living = found()
            assert living is not None  # its backward is running
            layer, number = layer_of(living, name), self.graph.priors.get(name)
            gain = present.detach() if layer.computes_gain else layer.gain  # which has moved since
            if number is None:
                return LayerContext([], None, gain)
            with no_autocast(layer):
                interpreter = Interpreter(self.graph, living, lambda name: normalized_message(norm_of(living, name)))
                return LayerContext([], layer.refine(interpreter.node(number)), gain)

        return renew

    def priors(self, model: nn.Module) -> dict[str, Gaussian]:
        """Compute the refined priors of all layers from the model's parameters, each node once."""
        return self.predictions(model, self.layers(model))[0]

    def predictions(
        self, model: nn.Module, layers: Sequence[BatchKalmanNorm]
    ) -> tuple[dict[str, Gaussian], list[Tensor]]:
        """Compute the refined priors by the names of their layers, and the gains of all layers."""
        with no_autocast(layers[0]):
            lowered = self.programs(model)
            found = None if lowered is None else lowered.predictions(model)
            if found is not None:
                return found
            interpreter = Interpreter(self.graph, model, lambda name: normalized_message(norm_of(model, name)))
            receiving = [layer for layer, name in zip(layers, self.names, strict=True) if name in self.graph.priors]
            analytic = [interpreter.node(self.graph.priors[name]) for name in self.names if name in self.graph.priors]
            refined = refine(receiving, analytic)
        named = [name for name in self.names if name in self.graph.priors]
        return dict(zip(named, refined, strict=True)), gains_of(layers)

    def programs(self, model: nn.Module) -> LoweredGraph | None:
        """Return the programs for the kernels, None where these cannot be called now."""
        kind = kind_for(self.layers(model)[0].gain_factor)
        if kind is None:
            return None
        if self.lowered is None or self.lowered.kind is not kind:
            self.lowered = LoweredGraph(self.graph, self.names, model, kind)
        return self.lowered


class _Posteriors:
    """The posteriors of one forward, and what they predict."""

    def __init__(self, hooks: PriorHooks, model: nn.Module) -> None:
        self.hooks, self.model = hooks, model
        self.posteriors: dict[str, Gaussian] = {}
        # Squared, so that r >= 0.
        self.noise: Tensor | None = parameter(model, hooks.noise).square() if hooks.noise else None
        rules = STRUCTURE if hooks.transition == "learned" else RULES
        self.interpreter = Interpreter(hooks.graph, model, self._message, rules)

    def _message(self, name: str) -> Gaussian:
        posterior = self.posteriors.get(name)
        if posterior is None:  # a layer that normalizes by its population statistics, such as a frozen one
            norm = norm_of(self.model, name)
            assert norm.running_mean is not None and norm.running_var is not None
            posterior = Gaussian(norm.running_mean[None].float(), norm.running_var[None].float())
        return posterior if self.hooks.transition == "learned" else diagonal(posterior)


class _PosteriorContext(LayerContext):
    """The context of a layer whose prior depends on the posteriors of this forward."""

    reads_posteriors = True

    def __init__(self, observations: list[Observation], forward: _Posteriors, name: str) -> None:
        super().__init__(observations)
        self.forward, self.name = forward, name

    def prior(self) -> Gaussian | None:
        """Return the refined prior of the layer, from the posteriors that have arrived."""
        number = self.forward.hooks.graph.priors.get(self.name)
        if number is None:
            return None
        layer = layer_of(self.forward.model, self.name)
        if is_recomputation() and self.forward.hooks.transition == "network":
            raise ConversionError(
                "raw messages cannot be recomputed as activation checkpointing wants it", "Use message='normalized'."
            )
        with no_autocast(layer):
            value = self.forward.interpreter.node(number)
            if self.forward.hooks.transition == "learned":
                assert self.forward.noise is not None and layer.transition is not None
                value = predict(value, layer.transition.to(value.mean.dtype), self.forward.noise)
            return layer.refine(value)

    def publish(self, posterior: Gaussian) -> None:
        """Take the posterior of the layer for those that follow."""
        self.forward.posteriors[self.name] = posterior


def find_hooks(model: nn.Module) -> tuple[nn.Module, PriorHooks]:
    """Return the converted model inside `model` and the hook that hands out its priors.

    Raises:
        ConversionError: for a model that was not converted.
    """
    return find_all_hooks(list(model.modules()))[0]


def find_all_hooks(modules: Sequence[nn.Module]) -> list[tuple[nn.Module, PriorHooks]]:
    """Return the converted ones among the modules of a model, itself first, each with its hook.

    Raises:
        ConversionError: for a model of which nothing was converted.
    """
    hooks = ((module, hook) for module in modules for hook in module._forward_pre_hooks.values())
    found = [(module, hook) for module, hook in hooks if isinstance(hook, PriorHooks)]
    if not found:
        raise ConversionError(
            f"this {type(modules[0]).__name__} was not converted to Batch Kalman Normalization",
            "Call bkn.convert first.",
        )
    return found


def detach(model: nn.Module) -> None:
    """Remove, in place, what a conversion added to a model beside its layers."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, h in hooks.items() if isinstance(getattr(h, "__self__", h), PriorHooks)]:
                hooks.pop(key)
                module._forward_hooks_always_called.pop(key, None)
        for key in [k for k, hook in module._load_state_dict_post_hooks.items() if hook is explain]:
            module._load_state_dict_post_hooks.pop(key)
        remove_input_moments(module)
