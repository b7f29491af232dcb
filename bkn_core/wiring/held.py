"""Priors and gains that several forwards share as constants; see `bkn_core.accumulation`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bkn_core.errors import ConversionError
from bkn_core.norm.handing import Handed, Relay
from bkn_core.norm.kalman import Gaussian
from bkn_core.norm.tracking import Seen


class Held:
    """The priors and gains of all forwards of one optimizer step, as constants with gradients of their own.

    Args:
        priors: by the names of their layers.
        gains: of all layers.
        leaves: which priors and gains are, or are parts of.
        innovations: those that the priors hold, of all layers.
        modules: of the converted model.
        schedules: the buffers that the gains are computed from.
    """

    def __init__(
        self,
        priors: dict[str, Gaussian],
        gains: list[Tensor],
        leaves: list[Tensor],
        innovations: Sequence[Tensor | None],
        modules: Sequence[nn.Module],
        schedules: Sequence[Tensor],
    ) -> None:
        self.priors, self.gains, self.innovations = priors, gains, innovations
        self.end = _End()
        self.has_gradients = torch.is_grad_enabled()
        self.parameters = [(m._parameters, name, p) for m in modules for name, p in m._parameters.items()]
        self.watched = [*(p for _, _, p in self.parameters if p is not None), *schedules]
        self.versions = [tensor._version for tensor in self.watched]
        for leaf in leaves:
            if leaf.requires_grad:
                leaf.register_hook(self.end)  # type: ignore[no-untyped-call]

    def serves_now(self) -> bool:
        """Whether a forward that begins now has these priors: its parameters are those of the block."""
        return self._is_in_place() and (self.has_gradients or not torch.is_grad_enabled())

    def is_current(self) -> bool:
        """Whether nothing has changed that the priors and gains were computed from."""
        return self._is_in_place() and self.versions == [tensor._version for tensor in self.watched]

    def _is_in_place(self) -> bool:
        return all(held.get(name) is parameter for held, name, parameter in self.parameters)

    def relays(self, ledger: list[Seen], names: Sequence[str]) -> list[Relay]:
        """Return what the layers of one forward are handed; a constant can be backpropagated to in parts."""
        found: list[Relay] = []
        for name, gain, innovation in zip(names, self.gains, self.innovations, strict=True):
            prior = self.priors.get(name)
            renew = functools.partial(Handed, [], prior, gain)
            found.append(Handed(ledger, prior, gain, renew, innovation))
        return found


class _End:
    """Refuses gradients that come when their block is over."""

    is_past = False

    def __call__(self, _: Tensor) -> None:
        if self.is_past:
            raise ConversionError(
                "a backward pass came after its bkn.accumulation block", "Call backward() inside the block."
            )
