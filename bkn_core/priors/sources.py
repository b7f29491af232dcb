"""Where priors come from: parameters, the posteriors of the forward that runs, or what the forwards of a step share.

The analytic prior of a layer has come through the graph from the layers before it. The layer's correction and
inflations refine it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from bkn_core.errors import ConversionError
from bkn_core.filter.kalman import Gaussian, diagonal, predict
from bkn_core.filter.state import Observation
from bkn_core.graph.graph import Graph
from bkn_core.graph.lookup import Entries
from bkn_core.graph.operations import Interpreter, Leaf
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.layers.forward import Forward, is_recomputation
from bkn_core.ops.track import joined, track
from bkn_core.priors.named_layers import gains_of, layer_of, no_autocast, norm_of, normalized_message, refine

Predictions = tuple[dict[str, Gaussian], dict[str, Tensor]]  # refined priors and gains, by the names of their layers


def analytic(graph: Graph, model: nn.Module, message: Leaf, noise: Tensor | None = None) -> Callable[[str], Gaussian]:
    """Return what computes the analytic prior of a layer, by its name.

    Args:
        graph: which layers feed which.
        model: whose parameters it reads.
        message: mean and variance of what a layer gives, by its name.
        noise: r of learned transitions, None where moments go through the network's own operations.
    """
    interpreter = Interpreter(graph, model, message, is_joined=noise is not None)

    def prior(name: str) -> Gaussian:
        value = interpreter.node(graph.priors[name])
        if noise is None:
            return value
        transition = layer_of(model, name).transition
        assert transition is not None
        return predict(value, transition.to(value.mean.dtype), noise)

    return prior


def predictions(graph: Graph, model: nn.Module, layers: Mapping[str, BatchKalmanNorm]) -> Predictions:
    """Compute, in PyTorch, the priors and gains of some layers from normalized messages, each node once."""
    prior = analytic(graph, model, lambda name: normalized_message(norm_of(model, name)))
    names = [name for name in layers if name in graph.priors]
    refined = refine([layers[name] for name in names], [prior(name) for name in names])
    return dict(zip(names, refined, strict=True)), gains_of(layers)


def again(graph: Graph, found: weakref.ref[nn.Module], gains: Mapping[str, Tensor], name: str) -> Forward:
    """Compute prior and gain of one layer once more, on their own.

    Args:
        graph: which layers feed which.
        found: the model, which goes at once when it is dropped.
        gains: of the forward that is repeated.
        name: of the layer.
    """
    model = found()
    assert model is not None  # its backward is running
    layer = layer_of(model, name)
    with no_autocast(layer):
        priors, own = predictions(graph, model, {name: layer})
    return Forward(priors, {name: gains[name].detach()} if layer.computes_gain else own)  # which has moved since


class FromPosteriors(Forward):
    """A forward whose priors depend on what the layers before have seen in it, computed when their layers run.

    Args:
        graph: which layers feed which.
        model: whose forward begins.
        noise: r of learned transitions, None where moments go through the network's own operations.
    """

    reads_posteriors = True

    def __init__(self, graph: Graph, model: nn.Module, noise: Tensor | None) -> None:
        super().__init__({}, {})
        self.graph, self.model, self.is_learned = graph, model, noise is not None
        self.posteriors: dict[str, Gaussian] = {}
        self.analytic = analytic(graph, model, self.message, noise)

    def message(self, name: str) -> Gaussian:
        """Return what a layer sends to those that follow."""
        posterior = self.posteriors.get(name)
        if posterior is None:  # a layer that normalizes by its population statistics, such as a frozen one
            norm = norm_of(self.model, name)
            assert norm.running_mean is not None and norm.running_var is not None
            posterior = Gaussian(norm.running_mean[None].float(), norm.running_var[None].float())
        return posterior if self.is_learned else diagonal(posterior)

    def prior(self, name: str) -> Gaussian | None:
        """Return the refined prior of a layer, from the posteriors that have arrived."""
        if name not in self.graph.priors:
            return None
        layer = layer_of(self.model, name)
        if is_recomputation() and not self.is_learned:
            raise ConversionError(
                "raw messages cannot be recomputed as activation checkpointing wants it", "Use message='normalized'."
            )
        with no_autocast(layer):
            return layer.refine(self.analytic(name))

    def publish(self, name: str, posterior: Gaussian) -> None:
        """Take the posterior of a layer for those that follow."""
        self.posteriors[name] = posterior


class Shared:
    """The priors and gains of all forwards of one optimizer step: leaves, whose gradients go on when the block ends.

    Args:
        constants: priors and gains.
        leaves: which they are, or are parts of.
        entries: where the model has the parameters that they are computed from.
        pass_on: sends the gradients of the leaves on, unless a value has changed; returns whether none has.
        fill: computes the constants anew for another block of a model; returns whether that could be done.
    """

    def __init__(
        self,
        constants: Predictions,
        leaves: Sequence[Tensor],
        entries: Entries,
        pass_on: Callable[[], bool],
        fill: Callable[[nn.Module], bool] = lambda _: False,
    ) -> None:
        self.constants = constants
        self.entries, self.pass_on, self.fill = entries, pass_on, fill
        self.observations: list[Observation] = []  # of all forwards, which the layers learn of when the block is over
        self.has_gradients, self.is_over = torch.is_grad_enabled(), False
        refuse = functools.partial(_refuse_late, weakref.ref(self))
        for leaf in leaves:
            if leaf.requires_grad:
                leaf.register_hook(refuse)  # type: ignore[no-untyped-call]

    def begin(self, model: nn.Module) -> bool:
        """Begin another block of a model, and return whether that could be done."""
        self.is_over = not self.fill(model)
        return not self.is_over

    def forward(self) -> Forward | None:
        """Return a forward of the block, None where one that begins now has priors of its own: other parameters."""
        if not self.entries.are_kept() or (torch.is_grad_enabled() and not self.has_gradients):
            return None
        constants = self.constants
        return Forward(*constants, lambda _: Forward(*constants))  # a constant can be backpropagated to in parts

    def keep(self, observations: Sequence[Observation]) -> None:
        """Keep what a forward has shown, without its graph."""
        self.observations += [seen._replace(statistics=seen.statistics.detach()) for seen in observations]

    def finish(self) -> None:
        """Send the sums of the gradients on to the parameters.

        Raises:
            ConversionError: something has changed that the priors and gains were computed from.
        """
        self.is_over = True
        if not self.entries.are_kept() or not self.pass_on():
            raise ConversionError(
                "parameters or gains changed inside bkn.accumulation", "Step optimizer and schedule outside the block."
            )

    def close(self) -> None:
        """Let the layers remember what all forwards have shown, as if they had been one."""
        self.is_over = True
        observations, self.observations = self.observations, []
        track(joined(observations))


def _refuse_late(found: weakref.ref[Shared], _: Tensor) -> None:
    shared = found()
    if shared is None or shared.is_over:
        raise ConversionError(
            "a backward pass came after its bkn.accumulation block", "Call backward() inside the block."
        )
