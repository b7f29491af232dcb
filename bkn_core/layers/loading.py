"""What a Batch Kalman layer takes from a state that was saved by an earlier version, or with other options."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_PRIOR = {"innovation", "input_mean"}
_LATER = ("mean_innovation", "residual", "uncertainty", "sensitivity", "gathered_sensitivity")


def complete_(state_dict: dict[str, Any], prefix: str, buffers: Mapping[str, Tensor | None]) -> None:
    """Give a saved state, in place, what was not there yet: no inflation of the mean, no uncertainty.

    Args:
        state_dict: of a model.
        prefix: of the layer's keys.
        buffers: of the layer.
    """
    if prefix + "innovation" not in state_dict:
        return
    state_dict.pop(prefix + "newest_sensitivity", None)
    for name in _LATER:
        own, saved = buffers[name], state_dict.get(prefix + name)
        if own is None:
            continue
        if saved is None:
            state_dict[prefix + name] = torch.zeros_like(own)
        elif saved.dim() < own.dim():
            state_dict[prefix + name] = torch.stack((saved, torch.zeros_like(saved)))


def explain(_: nn.Module, keys: Any) -> None:
    """Warn of a state that was saved with other options, of which `load_state_dict` only names the keys."""
    missing, unexpected = ({key.rpartition(".")[2] for key in names} for names in keys)
    if "gain_factor" in missing:
        words = "is of a model without Batch Kalman layers: load it first, then call bkn.convert"
    elif _PRIOR & missing:
        words = "has no priors where this model has some: convert both with the same options, such as input_prior"
    elif _PRIOR & unexpected:
        words = "has priors where this model has none: convert both with the same options, such as input_prior"
    else:
        return
    warnings.warn(f"the state that is loaded {words}", stacklevel=4)
