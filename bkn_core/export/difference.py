"""Why a graph and its model differ: how far the model is from itself in float64, and which layer differs first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def explained(reference: Callable[[Tensor], Tensor], prepared: nn.Module | None, images: Tensor, t: float) -> str:
    """Say where the difference between a model and what was traced in its place begins; "" where neither is known.

    Args:
        reference: the model, in the mode that it was compared in.
        prepared: what was traced; None where that is not known.
        images: a batch on which the graph differs.
        t: of |a - b| <= t + t |b|.
    """
    if not isinstance(reference, nn.Module):
        return ""
    expected = _outputs(reference, images)
    try:
        wide = copy.deepcopy(reference).double()(images.double())
    except RuntimeError:  # its forward makes float32 of something
        words = "; the model itself does not run in float64"
    else:
        words = (
            f"; the model itself is {(expected[''].double() - wide).abs().max().item():.2g} from its result in float64"
        )
    if prepared is None:
        return words
    found = _outputs(prepared, images)
    for name, wanted in expected.items():
        part = found.get(name)
        if part is not None and not (part.shape == wanted.shape and torch.allclose(part, wanted, t, t)):
            kind = type(reference.get_submodule(name)).__name__
            apart = f" by {(part - wanted).abs().max().item():.2g}" if part.shape == wanted.shape else ""
            return f"{words}; the first layer to differ is {name or 'the model'} ({kind}){apart}"
    return f"{words}; no layer differs before ONNX Runtime, so its operators do"


def _outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return what each module gave in its last call, by paths, in the order in which they ended."""
    found: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found.pop(name, None)
                found[name] = output.clone()  # which an activation in place may change

        return keep

    handles = [module.register_forward_hook(keeper(name)) for name, module in model.named_modules()]
    try:
        found[""] = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found
