"""Call a model with what a user gave for its arguments, and say in words where that does not fit."""

from __future__ import annotations

from typing import Any

from torch import nn

from bkn_core.errors import BknError, ConversionError


def entered(model: nn.Module, arguments: Any, name: str) -> Any:
    """Run a forward of a model.

    Args:
        model: what is called.
        arguments: a tensor, or a tuple or dict of the forward's arguments.
        name: of what the user gave.

    Raises:
        ConversionError: the forward fails.
    """
    try:
        if isinstance(arguments, dict):
            return model(**arguments)
        return model(*arguments) if isinstance(arguments, tuple) else model(arguments)
    except BknError:
        raise
    except Exception as error:
        mode = "training" if model.training else "evaluation"
        words = (str(error).strip().splitlines() or [""])[0][:300]
        raise ConversionError(
            f"the forward of {type(model).__name__} in {mode} mode fails on {name} ({_form(arguments)}): "
            f"{type(error).__name__}: {words}",
            "Give a tensor, or a tuple or dict of all that the forward takes in this mode (detection: targets too).",
        ) from error


def _form(arguments: Any) -> str:
    if isinstance(arguments, tuple):
        return f"a tuple of {len(arguments)}"
    if isinstance(arguments, dict):
        return f"a dict of {', '.join(map(str, arguments))}"
    shape = getattr(arguments, "shape", None)
    return type(arguments).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")
