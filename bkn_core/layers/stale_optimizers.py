"""Notice an optimizer that was built before a conversion: it trains the old model, and the new one stands still."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Conversion = TypeVar("Conversion", bound=Callable[..., nn.Module])


@functools.cache
def _watches() -> list[_Watch]:
    """Return the conversions that no step of an optimizer has settled yet; asking begins the watch."""
    found: list[_Watch] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if found and not torch.compiler.is_compiling():
            stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            found[:] = [watch for watch in found if not watch.is_settled_by(type(optimizer).__name__, stepped)]

    register_optimizer_step_post_hook(look)
    return found


def watched(conversion: Conversion) -> Conversion:
    """Let a function that returns another model than it is given watch over the optimizers that step afterwards."""

    @functools.wraps(conversion)
    def watching(model: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
        converted = conversion(model, *arguments, **options)
        known = _watches()
        known[:] = [*(watch for watch in known if watch.living()), _Watch(model, converted)]
        return converted

    return cast(Conversion, watching)


class _Watch:
    """Warns at the second step of an optimizer of the old model after which the new one has gradients, unmoved.

    The second, since somebody may train both: by then the new one has moved. It reads version counters, no values.
    """

    def __init__(self, old: nn.Module, new: nn.Module) -> None:
        self.old, self.new = _by_identity(old), _by_identity(new)
        self.versions: list[int] | None = None

    def living(self) -> list[Tensor]:
        """Return the parameters of the new model, nothing once it is gone."""
        return [parameter for reference in self.new.values() if (parameter := reference()) is not None]

    def is_settled_by(self, name: str, stepped: Sequence[Tensor]) -> bool:
        """Look at the parameters that an optimizer has moved, and return whether there is nothing more to watch for."""
        living = self.living()
        if not living or any(_holds(self.new, parameter) for parameter in stepped):
            return True
        versions = [parameter._version for parameter in living if parameter.grad is not None]
        if not versions or not any(_holds(self.old, parameter) for parameter in stepped):
            return False
        before, self.versions = self.versions, versions
        if before != versions:
            return False
        warnings.warn(
            f"this {name} was built before bkn.convert: it trains the parameters of the old model, and the new "
            "one, which has gradients, does not move. Build the optimizer after bkn.convert, from what it returns.",
            stacklevel=5,
        )
        return True


def _by_identity(model: nn.Module) -> dict[int, weakref.ref[Tensor]]:
    return {id(parameter): weakref.ref(parameter) for parameter in model.parameters()}


def _holds(known: dict[int, weakref.ref[Tensor]], parameter: Tensor) -> bool:
    reference = known.get(id(parameter))
    return reference is not None and reference() is parameter
