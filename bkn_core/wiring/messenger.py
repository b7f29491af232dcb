"""Hand every normalization layer of a model its prior at each forward: a root hook that holds names, no tensors."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.errors import ConversionError
from bkn_core.norm import native, together
from bkn_core.norm.handing import Handed, Relay, is_recomputation, not_again
from bkn_core.norm.kalman import Gaussian, diagonal, predict
from bkn_core.norm.layers import BatchKalmanNorm
from bkn_core.norm.loading import explain
from bkn_core.norm.tracking import Seen, track
from bkn_core.wiring.evaluate import RULES, STRUCTURE, Evaluation, parameter
from bkn_core.wiring.held import Held, HeldRow
from bkn_core.wiring.lookup import Lookup
from bkn_core.wiring.parameters import check_own
from bkn_core.wiring.program import Wiring
from bkn_core.wiring.stages import Stages

Transition = Literal["learned", "network"]
Message = Literal["normalized", "raw"]


@dataclasses.dataclass
class Messenger:
    """The forward hooks of a converted model.

    With normalized messages a prior depends on parameters only: all are computed once, before the forward. With raw
    messages and learned transitions a layer's prior depends on this forward's posteriors, so it is computed when the
    layer runs, from the posteriors of those that ran before it.

    Args:
        wiring: which layers feed which.
        transition: "network" or "learned".
        message: "normalized" or "raw"; learned transitions always send the raw posterior.
        noise: path of the parameter of r, shared by all learned transitions; "" without any.
        names: the Batch Kalman Normalization layers, in forward order.
    """

    wiring: Wiring
    transition: Transition
    message: Message
    names: tuple[str, ...]
    noise: str = ""
    stages: Stages | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.lookup = Lookup(self.names)
        self.held: Held | None = None  # inside `accumulation`
        self.row: HeldRow | None = None  # of its last block

    def __getstate__(self) -> dict[str, Any]:
        """Copies are outside every block."""
        return {**self.__dict__, "held": None, "row": None}

    def attach(self, model: nn.Module) -> None:
        """Register the hooks on the model."""
        model.register_forward_pre_hook(self)
        model.register_forward_hook(Farewell(self), always_call=True)
        model.register_load_state_dict_post_hook(explain)  # type: ignore[no-untyped-call]

    @property
    def is_static(self) -> bool:
        """Whether priors depend on parameters only."""
        return self.transition == "network" and self.message == "normalized"

    def __call__(self, model: nn.Module, arguments: Any = None) -> None:
        """Open the relays of the forward that begins."""
        layers = self.layers(model)
        if not any(layer.uses_batch_statistics for layer in layers):
            return
        ledger: list[Seen] = []
        relays: list[Relay]
        if self.held is not None and not torch.compiler.is_compiling() and self.held.serves_now():
            relays = self.held.relays(ledger, self.names)
        elif self.is_static:
            priors, gains = self.predictions(model, layers)
            relays = [
                Handed(ledger, priors.get(name), gain, self._renewal(model, name, gain))
                for name, gain in zip(self.names, gains, strict=True)
            ]
        else:
            post = _Post(self, model)
            relays = [_Relay(ledger, post, name) for name in self.names]
        for layer, relay in zip(layers, relays, strict=True):
            layer.hand(relay)

    def layers(self, model: nn.Module) -> list[BatchKalmanNorm]:
        """Return the layers in the order of their names."""
        return [checked(layer, name) for layer, name in zip(self.lookup(model), self.names, strict=True)]

    def _renewal(self, model: nn.Module, name: str, present: Tensor) -> Callable[[], Handed] | None:
        """Return how to compute one layer's prior and gain on their own, as reentrant checkpoints need them."""
        if torch.compiler.is_compiling():
            return None
        found = weakref.ref(model)  # so that a model that is dropped goes at once

        def renew() -> Handed:
            living = found()
            assert living is not None  # its backward is running
            layer, number = layer_of(living, name), self.wiring.priors.get(name)
            gain = present.detach() if layer.computes_gain else layer.gain  # which has moved since
            if number is None:
                return Handed([], None, gain)
            with _no_autocast(layer):
                evaluation = Evaluation(self.wiring, living, lambda name: normalized_message(norm_of(living, name)))
                return Handed([], layer.refine(evaluation.line(number)), gain)

        return renew

    def priors(self, model: nn.Module) -> dict[str, Gaussian]:
        """Compute the refined priors of all layers from the model's parameters, each line once."""
        return self.predictions(model, self.layers(model))[0]

    def predictions(
        self, model: nn.Module, layers: Sequence[BatchKalmanNorm]
    ) -> tuple[dict[str, Gaussian], list[Tensor]]:
        """Compute the refined priors by the names of their layers, and the gains of all layers."""
        with _no_autocast(layers[0]):
            stages = self.programs(model)
            found = None if stages is None else stages.predictions(model)
            if found is not None:
                return found
            evaluation = Evaluation(self.wiring, model, lambda name: normalized_message(norm_of(model, name)))
            receiving = [layer for layer, name in zip(layers, self.names, strict=True) if name in self.wiring.priors]
            analytic = [evaluation.line(self.wiring.priors[name]) for name in self.names if name in self.wiring.priors]
            refined = together.refine(receiving, analytic)
        named = [name for name in self.names if name in self.wiring.priors]
        return dict(zip(named, refined, strict=True)), together.gains(layers)

    def programs(self, model: nn.Module) -> Stages | None:
        """Return the programs for the CPU kernels, None where these cannot be called now."""
        if not native.are_usable():
            return None
        if self.stages is None:
            self.stages = Stages(self.wiring, self.names, model)
        return self.stages


class Farewell:
    """The end of a forward: moves the moving statistics and closes the relays.

    A layer called on its own afterwards does not use that forward's prior, which stays readable for recomputation in
    the backward pass.
    """

    def __init__(self, messenger: Messenger) -> None:
        self.messenger = messenger

    def __call__(self, model: nn.Module, *_: Any) -> None:
        """Close the relays."""
        ledger: list[Seen] = []
        try:
            layers = self.messenger.lookup(model)
        except ConversionError:  # a changed model has been refused before
            return
        for layer in layers:
            if not isinstance(layer, BatchKalmanNorm):
                continue
            mailbox = layer.mailboxes.own
            if mailbox.is_open and mailbox.relay is not None:
                mailbox.is_open, ledger = False, mailbox.relay.ledger
        held = self.messenger.held
        if held is None:
            track(ledger)
        else:
            held.note(ledger)
        ledger.clear()  # or the layers, which hold their relay, would hold themselves


class _Post:
    """The posteriors of one forward, and what they predict."""

    def __init__(self, messenger: Messenger, model: nn.Module) -> None:
        self.messenger, self.model = messenger, model
        self.posteriors: dict[str, Gaussian] = {}
        # Squared, so that r >= 0.
        self.noise: Tensor | None = parameter(model, messenger.noise).square() if messenger.noise else None
        rules = STRUCTURE if messenger.transition == "learned" else RULES
        self.evaluation = Evaluation(messenger.wiring, model, self._message, rules)

    def _message(self, name: str) -> Gaussian:
        posterior = self.posteriors.get(name)
        if posterior is None:  # a layer that normalizes by its population statistics, such as a frozen one
            norm = norm_of(self.model, name)
            assert norm.running_mean is not None and norm.running_var is not None
            posterior = Gaussian(norm.running_mean[None].float(), norm.running_var[None].float())
        return posterior if self.messenger.transition == "learned" else diagonal(posterior)


@dataclasses.dataclass
class _Relay:
    """One layer's access to the post."""

    ledger: list[Seen]
    post: _Post
    name: str
    reads_posteriors = True
    is_without_gradient: bool = False

    def prior(self) -> Gaussian | None:
        """Return the refined prior of the layer, from the posteriors that have arrived."""
        number = self.post.messenger.wiring.priors.get(self.name)
        if number is None:
            return None
        layer = layer_of(self.post.model, self.name)
        if is_recomputation() and self.post.messenger.transition == "network":
            raise ConversionError(
                "raw messages cannot be recomputed as activation checkpointing wants it", "Use message='normalized'."
            )
        with _no_autocast(layer):
            value = self.post.evaluation.line(number)
            if self.post.messenger.transition == "learned":
                assert self.post.noise is not None and layer.transition is not None
                value = predict(value, layer.transition.to(value.mean.dtype), self.post.noise)
            return layer.refine(value)

    def gain(self) -> None:
        """Leave it to the layer."""

    def publish(self, posterior: Gaussian) -> None:
        """Take the posterior of the layer for those that follow."""
        self.post.posteriors[self.name] = posterior

    def record(self, seen: Seen) -> None:
        """Keep it for the end of the forward."""
        self.ledger.append(seen)

    def alone(self) -> Relay:
        """Refuse: others have used the posterior without its gradient."""
        raise not_again()


def _no_autocast(layer: BatchKalmanNorm) -> torch.autocast:
    """Keep statistics out of mixed precision."""
    device = layer.gain_factor.device.type
    return torch.autocast(device if torch.amp.is_autocast_available(device) else "cpu", enabled=False)


def normalized_message(norm: _BatchNorm) -> Gaussian:
    """Return mean and variance of a layer's output under its own posterior: (β, γ²)."""
    known = next((t for t in (norm.weight, norm.bias, norm.running_mean) if t is not None), torch.empty(0))
    wide = torch.promote_types(known.dtype, torch.float32)
    mean = known.new_zeros(norm.num_features, dtype=wide) if norm.bias is None else norm.bias.to(wide)
    scale = known.new_ones(norm.num_features, dtype=wide) if norm.weight is None else norm.weight.to(wide)
    return Gaussian(mean, scale.square())


def norm_of(model: nn.Module, name: str) -> _BatchNorm:
    """Return a normalization layer by name.

    Raises:
        ConversionError: if the model was changed after its conversion.
    """
    norm = model.get_submodule(name)
    if not isinstance(norm, _BatchNorm):
        raise ConversionError(
            f"{name} was a normalization layer at conversion and is a {type(norm).__name__} now",
            "Change the model first, then convert it again.",
        )
    for own in ("weight", "bias"):
        check_own(norm, name, own)
    return norm


def layer_of(model: nn.Module, name: str) -> BatchKalmanNorm:
    """Return a Batch Kalman Normalization layer by name.

    Raises:
        ConversionError: if the model was changed after its conversion.
    """
    return checked(norm_of(model, name), name)


def checked(layer: nn.Module, name: str) -> BatchKalmanNorm:
    """Return a module as the layer that it was at the conversion.

    Raises:
        ConversionError: if the model was changed after its conversion.
    """
    if not isinstance(layer, BatchKalmanNorm):
        raise ConversionError(f"{name} is a {type(layer).__name__} since the conversion", "Convert the model again.")
    return layer
