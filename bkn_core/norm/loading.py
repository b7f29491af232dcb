"""What a Batch Kalman layer takes from a state that was saved by an earlier version, or with other options."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

_PRIOR = {"innovation", "input_mean"}


def complete_(state: dict[str, Any], prefix: str, layer: nn.Module) -> None:
    """Add, in place, what an earlier version did not save: the innovation of the mean and the uncertainty."""
    if prefix + "innovation" in state:
        for name in ("mean_innovation", "residual", "uncertainty", "sensitivity", "newest_sensitivity"):
            own, saved = layer._buffers[name], state.get(prefix + name)
            if own is not None and (saved is None or saved.dim() < own.dim()):
                absent = torch.zeros_like(own) if saved is None else torch.stack((saved, torch.zeros_like(saved)))
                state[prefix + name] = absent


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
