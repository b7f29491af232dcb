"""Start the priors of a pretrained model from what it knows: its population statistics."""

from __future__ import annotations

import functools

import torch
from torch import nn

from bkn_core.convert import find_messenger
from bkn_core.errors import ConversionError
from bkn_core.quality import analytic_priors, known_message
from bkn_core.wiring.messenger import layer_of


@torch.no_grad()
def calibrate_priors_(model: nn.Module) -> None:
    """Set, in place, the learned corrections so that the prior of each layer is its population statistics (m, v).

        δ = (m - µ') / sqrt(v' + ε),   ρ = log( (v + ε) / (v' + ε) ) - ι

    For a pretrained model, after its conversion and before fine-tuning: the closed form underestimates variances, and
    without this the model begins some steps away from what it had learned.

    Args:
        model: a model that `convert` returned from a trained one.

    Raises:
        ConversionError: for a model that was not converted, or with layers that have no correction or no statistics.
    """
    root, messenger = find_messenger(model)
    for name, prior in analytic_priors(root, messenger, functools.partial(known_message, root, messenger)).items():
        layer = layer_of(root, name)
        if layer.prior_offset is None or layer.prior_log_scale is None:
            raise ConversionError(f"{name} has no correction to calibrate", "Convert with correction=True.")
        if layer.running_mean is None or layer.running_var is None:
            raise ConversionError(f"{name} keeps no population statistics", "Use track_running_stats=True.")
        mean, variance = (values.reshape(-1) for values in prior)
        layer.prior_offset.copy_((layer.running_mean - mean) / (variance + layer.eps).sqrt())
        ratio = torch.log((layer.running_var + layer.eps) / (variance + layer.eps))
        layer.prior_log_scale.copy_(ratio if layer.innovation is None else ratio - layer.innovation)
