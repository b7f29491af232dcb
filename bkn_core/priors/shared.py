"""Priors and gains that several forwards share as constants; see `bkn_core.priors.accumulation`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bkn_core.errors import ConversionError
from bkn_core.filter.kalman import Gaussian
from bkn_core.filter.state import Observation
from bkn_core.graph.kernel_program import KernelProgram
from bkn_core.graph.lookup import Entries
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.layers.forward import LayerContext
from bkn_core.ops.extension import Operations
from bkn_core.ops.track import existing, joined, track

Constants = tuple[dict[str, Gaussian], list[Tensor]]  # priors by the names of their layers, gains of all layers


class Shared:
    """The priors and gains of all forwards of one optimizer step, as constants with gradients of their own.

    Args:
        constants: priors and gains.
        leaves: which they are, or are parts of.
        entries: where the model has the parameters that they are computed from.
    """

    def __init__(self, constants: Constants, leaves: Sequence[Tensor], entries: Entries) -> None:
        (self.priors, self.gains), self.entries = constants, entries
        self.observations: list[Observation] = []  # of all forwards, which the layers learn of when the block is over
        self.has_gradients = torch.is_grad_enabled()
        self.end = _End()
        for leaf in leaves:
            if leaf.requires_grad:
                leaf.register_hook(self.end)  # type: ignore[no-untyped-call]

    def serves_now(self) -> bool:
        """Whether a forward that begins now has these priors: its parameters are those of the block."""
        return self.entries.are_kept() and (self.has_gradients or not torch.is_grad_enabled())

    def contexts(self, observations: list[Observation], names: Sequence[str]) -> list[LayerContext]:
        """Return what the layers of one forward are handed; a constant can be backpropagated to in parts."""
        found: list[LayerContext] = []
        for name, gain in zip(names, self.gains, strict=True):
            prior = self.priors.get(name)
            renew = functools.partial(LayerContext, [], prior, gain)
            found.append(LayerContext(observations, prior, gain, renew))
        return found

    def keep(self, observations: Sequence[Observation]) -> None:
        """Keep what a forward has shown, without its graph."""
        self.observations += [seen._replace(statistics=seen.statistics.detach()) for seen in observations]

    def track(self) -> None:
        """Let the layers remember what all forwards have shown, as if they had been one."""
        observations, self.observations = self.observations, []
        track(joined(observations))

    def finish(self) -> None:
        """Send the sums of the gradients on to the parameters.

        Raises:
            ConversionError: something has changed that the priors and gains were computed from.
        """
        if not self.entries.are_kept() or not self.backward():
            raise ConversionError(
                "parameters or gains changed inside bkn.accumulation", "Step optimizer and schedule outside the block."
            )

    def backward(self) -> bool:
        """Send the sums of the gradients on, unless a value has changed; return whether none has."""
        raise NotImplementedError


class SharedOutputs(Shared):
    """Priors and gains by autograd, for one block.

    Args:
        constants: with their graph.
        layers: by name.
        modules: of the converted model.
    """

    def __init__(self, constants: Constants, layers: dict[str, BatchKalmanNorm], modules: Sequence[nn.Module]) -> None:
        priors, gains = constants
        self.outputs = [*itertools.chain.from_iterable(priors.values()), *gains]
        self.leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self.outputs]
        parts = iter(self.leaves)
        values = {name: Gaussian(next(parts), next(parts)) for name in priors}
        buffers = {name: layer._buffers for name, layer in layers.items()}  # which attributes find after parameters
        schedules = existing([own[name] for own in buffers.values() for name in ("gain_factor", "fixed_gain")])
        entries = Entries((m._parameters, name, p) for m in modules for name, p in m._parameters.items())
        self.watched = [*existing(entries.values), *schedules]
        self.versions = [tensor._version for tensor in self.watched]
        super().__init__((values, list(parts)), self.leaves, entries)

    def backward(self) -> bool:
        """Send the sums of the gradients on, unless a value has changed; return whether none has."""
        if self.versions != [tensor._version for tensor in self.watched]:
            return False
        reached = [(output, leaf.grad) for output, leaf in zip(self.outputs, self.leaves, strict=True)]
        reached = [(output, gradient) for output, gradient in reached if gradient is not None]
        if reached:
            torch.autograd.backward([output for output, _ in reached], [gradient for _, gradient in reached])
        return True


class SharedRow(Shared):
    """Priors and gains by the kernels: all of them in one row (`cpu/shared_row.h`), which every block fills anew.

    Args:
        program: gives them.
        entries: of the tensors that it reads.
        operations: of C++.
    """

    def __init__(self, program: KernelProgram, entries: Entries, operations: Operations) -> None:
        self.program, self.row = program, operations.row(program.in_cpp(operations), entries.values)
        leaf, parts = self.row.parts()
        super().__init__(program.named(parts), [leaf], entries)

    def begins(self, model: nn.Module) -> bool:
        """Fill the row for a block of this model, and return whether that could be done."""
        if self.program.tensors.known(model) is not self.entries or not self.row.begin():
            return False
        self.end.is_past = False
        return True

    def backward(self) -> bool:
        """Send the gradient of the row on, unless a value has changed; return whether none has."""
        return self.row.finish()


class _End:
    """Refuses gradients that come when their block is over."""

    is_past = False

    def __call__(self, _: Tensor) -> None:
        if self.is_past:
            raise ConversionError(
                "a backward pass came after its bkn.accumulation block", "Call backward() inside the block."
            )
