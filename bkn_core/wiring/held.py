"""Priors and gains that several forwards share as constants; see `bkn_core.accumulation`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bkn_core.errors import ConversionError
from bkn_core.norm.compiled_node import Operations
from bkn_core.norm.handing import Handed, Relay
from bkn_core.norm.kalman import Gaussian
from bkn_core.norm.layers import BatchKalmanNorm
from bkn_core.norm.together import those
from bkn_core.norm.tracking import Seen
from bkn_core.wiring.lookup import Places
from bkn_core.wiring.native_node import ACCUMULATES, FIELDS, evaluate
from bkn_core.wiring.native_program import NativeProgram

Constants = tuple[dict[str, Gaussian], list[Tensor]]  # priors by the names of their layers, gains of all layers


class Held:
    """The priors and gains of all forwards of one optimizer step, as constants with gradients of their own.

    Args:
        constants: priors and gains.
        leaves: which they are, or are parts of.
        innovations: those that the priors hold, by the names of their layers.
        places: where the model has the parameters that they are computed from.
        watched: what may not change as long as they serve.
    """

    def __init__(
        self,
        constants: Constants,
        leaves: Sequence[Tensor],
        innovations: dict[str, Tensor],
        places: Places,
        watched: Sequence[Tensor],
    ) -> None:
        (self.priors, self.gains), self.leaves = constants, leaves
        self.innovations, self.places, self.watched = innovations, places, watched
        self.has_gradients = torch.is_grad_enabled()
        self.versions = _versions(watched)
        self.end = _End()
        for leaf in leaves:
            if leaf.requires_grad:
                leaf.register_hook(self.end)  # type: ignore[no-untyped-call]

    def serves_now(self) -> bool:
        """Whether a forward that begins now has these priors: its parameters are those of the block."""
        return self.places.are_kept() and (self.has_gradients or not torch.is_grad_enabled())

    def relays(self, ledger: list[Seen], names: Sequence[str]) -> list[Relay]:
        """Return what the layers of one forward are handed; a constant can be backpropagated to in parts."""
        found: list[Relay] = []
        for name, gain in zip(names, self.gains, strict=True):
            prior = self.priors.get(name)
            renew = functools.partial(Handed, [], prior, gain)
            found.append(Handed(ledger, prior, gain, renew, self.innovations.get(name)))
        return found

    def finish(self) -> None:
        """Send the sums of the gradients on to the parameters.

        Raises:
            ConversionError: something has changed that the priors and gains were computed from.
        """
        if not self.places.are_kept() or self.versions != _versions(self.watched):
            raise ConversionError(
                "parameters or gains changed inside bkn.accumulation", "Step optimizer and schedule outside the block."
            )
        if any(leaf.grad is not None for leaf in self.leaves):
            self.backward([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves])

    def backward(self, gradients: list[Tensor]) -> None:
        """Send gradients of the leaves on."""
        raise NotImplementedError


class HeldOutputs(Held):
    """Priors and gains by autograd, for one block.

    Args:
        constants: with their graph.
        layers: by name.
        modules: of the converted model.
    """

    def __init__(self, constants: Constants, layers: dict[str, BatchKalmanNorm], modules: Sequence[nn.Module]) -> None:
        priors, gains = constants
        self.outputs = [*itertools.chain.from_iterable(priors.values()), *gains]
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self.outputs]
        parts = iter(leaves)
        held = {name: Gaussian(next(parts), next(parts)) for name in priors}
        buffers = {name: layer._buffers for name, layer in layers.items()}  # which attributes find after parameters
        innovations = {n: own["innovation"].clone() for n, own in buffers.items() if own["innovation"] is not None}
        schedules = those([own[name] for own in buffers.values() for name in ("gain_factor", "fixed_gain")])
        places = Places((m._parameters, name, p) for m in modules for name, p in m._parameters.items())
        super().__init__((held, list(parts)), leaves, innovations, places, [*those(places.values), *schedules])

    def backward(self, gradients: list[Tensor]) -> None:
        """Send gradients of the leaves on."""
        reached = [(output, part) for output, part in zip(self.outputs, gradients, strict=True) if output.requires_grad]
        torch.autograd.backward([output for output, _ in reached], [part for _, part in reached])


class HeldRow(Held):
    """Priors and gains by the kernels, in C++: all of them in one row, which every block fills anew.

    Args:
        program: gives them.
        places: of the tensors that it reads.
        operations: of C++.
    """

    def __init__(self, program: NativeProgram, places: Places, operations: Operations) -> None:
        self.program, self.operations, tensors = program, operations, places.values
        self.values, self.lines = torch.empty(program.size), program.structure(tensors, [])
        evaluate(self.lines, self.values)
        self.row = self.values[: program.results].requires_grad_()
        self.parts = operations.parts(self.row, [*program.widths, *program.widths], len(program.names))
        self.present = {name: tensors[number] for number, name in program.moving.items()}
        innovations = {name: innovation.clone() for name, innovation in self.present.items()}
        watched = [tensor for i, tensor in enumerate(tensors) if i not in program.moving]
        super().__init__(program.named(self.parts), [self.row], innovations, places, watched)

    def begin_again(self) -> None:
        """Fill the row for another block. A backward pass through a forward of an earlier one sees a newer version."""
        evaluate(self.lines, self.values)
        torch.autograd.graph.increment_version(self.parts)
        self.row.grad, self.versions, self.end.is_past = None, _versions(self.watched), False
        if self.innovations:
            torch._foreach_copy_(list(self.innovations.values()), list(self.present.values()))

    def backward(self, gradients: list[Tensor]) -> None:
        """Add to the gradients of the parameters in place."""
        lines = torch.frombuffer(self.lines, dtype=torch.int64).view(-1, FIELDS)
        where = lines, self.program.gradient_places, ACCUMULATES
        self.operations.add_gradients(self.places.values, *where, self.values, *gradients)


class _End:
    """Refuses gradients that come when their block is over."""

    is_past = False

    def __call__(self, _: Tensor) -> None:
        if self.is_past:
            raise ConversionError(
                "a backward pass came after its bkn.accumulation block", "Call backward() inside the block."
            )


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors]
