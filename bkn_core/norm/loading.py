"""What an earlier version saved of a layer, in the form that this one reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_LATER = ("mean_innovation", "residual", "uncertainty", "sensitivity", "gathered_sensitivity")


def complete_(state_dict: dict[str, Any], prefix: str, buffers: Mapping[str, Tensor | None]) -> None:
    """Give a saved state, in place, what was not there yet: no innovation of the mean, no uncertainty.

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
