"""Hand every normalization layer of a model its prior at each forward: a root hook that holds names, no tensors."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bkn_core.errors import ConversionError
from bkn_core.filter.kalman import Gaussian
from bkn_core.graph.expressions import parameter
from bkn_core.graph.graph import Graph
from bkn_core.graph.input_moments import remove_input_moments
from bkn_core.graph.lookup import Lookup
from bkn_core.graph.lower import LoweredGraph, kind_for
from bkn_core.graph.operations import Leaf
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.layers.forward import Forward
from bkn_core.layers.loading import explain
from bkn_core.ops.track import track
from bkn_core.priors.named_layers import checked, no_autocast
from bkn_core.priors.sources import FromPosteriors, Predictions, Shared, again, analytic, predictions

Transition = Literal["learned", "network"]
Message = Literal["normalized", "raw"]


@dataclasses.dataclass
class PriorHooks:
    """The forward hooks of a converted model: `__call__` before it, `close_forward` behind it.

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
        self.row: Shared | None = None  # of its last block, by the kernels

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
        """Open the forward that begins."""
        layers = self.layers(model)
        if any(layer.uses_batch_statistics for layer in layers.values()):
            forward = self.forward(model, layers)
            for name, layer in layers.items():
                layer.enter(forward, name)

    def forward(self, model: nn.Module, layers: Mapping[str, BatchKalmanNorm]) -> Forward:
        """Return a forward that begins now, with priors from where they come from."""
        is_compiling = torch.compiler.is_compiling()
        shared = None if self.shared is None or is_compiling else self.shared.forward()
        if shared is not None:
            return shared
        if not self.is_static:
            return FromPosteriors(self.graph, model, self._noise(model))
        priors, gains = self.predictions(model, layers)
        found = None if is_compiling else functools.partial(again, self.graph, weakref.ref(model), gains)
        return Forward(priors, gains, found)

    def close_forward(self, model: nn.Module, *_: Any) -> None:
        """Move what the layers remember.

        A layer called on its own afterwards does not use that forward's prior, which stays readable for recomputation
        in the backward pass.
        """
        try:
            layers = self.lookup(model)
        except ConversionError:  # a changed model has been refused before
            return
        newest = [layer.slots.own.forward for layer in layers if isinstance(layer, BatchKalmanNorm)]
        forward = newest[0] if newest else None
        if forward is None or not forward.is_open:
            return
        forward.is_open = False
        if self.shared is None:
            track(forward.observations)
        else:
            self.shared.keep(forward.observations)
        forward.observations.clear()  # or the layers, which hold their forward, would hold themselves

    def layers(self, model: nn.Module) -> dict[str, BatchKalmanNorm]:
        """Return the layers by their names."""
        return {name: checked(layer, name) for name, layer in zip(self.names, self.lookup(model), strict=True)}

    def priors(self, model: nn.Module) -> dict[str, Gaussian]:
        """Compute the refined priors of all layers from the model's parameters, each node once."""
        return self.predictions(model, self.layers(model))[0]

    def predictions(self, model: nn.Module, layers: Mapping[str, BatchKalmanNorm]) -> Predictions:
        """Compute the refined priors and the gains of all layers, by the kernels where they can take the tensors."""
        with no_autocast(layers[self.names[0]]):
            lowered = self.programs(model)
            found = None if lowered is None else lowered.predictions(model)
            return predictions(self.graph, model, layers) if found is None else found

    def programs(self, model: nn.Module) -> LoweredGraph | None:
        """Return the programs for the kernels, None where these cannot be called now."""
        kind = kind_for(checked(self.lookup(model)[0], self.names[0]).gain_factor)
        if kind is None:
            return None
        if self.lowered is None or self.lowered.kind is not kind:
            self.lowered = LoweredGraph(self.graph, self.names, model, kind)
        return self.lowered

    def analytic_priors(self, model: nn.Module, message: Leaf) -> dict[str, Gaussian]:
        """Return all priors before their refinement, from the messages of all layers."""
        prior = analytic(self.graph, model, message, self._noise(model))
        return {name: prior(name) for name in self.graph.priors}

    def _noise(self, model: nn.Module) -> Tensor | None:
        """Return r of learned transitions."""
        return parameter(model, self.noise).square() if self.noise else None  # so that r >= 0


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
