"""Start the priors of a pretrained model from what it knows: its population statistics."""

from __future__ import annotations

import functools

import torch
from torch import nn

from bkn_core.errors import ConversionError
from bkn_core.priors.hooks import find_hooks
from bkn_core.priors.named_layers import layer_of
from bkn_core.priors.quality import known_message

# As after some forwards that showed an exact prior: what was learned outweighs the first images.
_KNOWN = (20.0, 0.0, 0.0, 0.1, 0.1)


@torch.no_grad()
def calibrate_priors_(model: nn.Module) -> None:
    """Set, in place, the inflations so that the prior of each layer is its population statistics (m, v).

        δ = (m - µ') / sqrt(v' + ε),   ι = log( (v + ε) / (v' + ε) )

    Layers without inflations have their learned corrections set in their place; a correction beside them is kept.

    For a pretrained model, after its conversion and before fine-tuning: the closed form underestimates variances, and
    without this the model begins some steps away from what it had learned.

    Args:
        model: a model that `convert` returned from a trained one.

    Raises:
        ConversionError: for a model that was not converted, or with a layer that has neither inflations nor a
            correction, or no statistics.
    """
    root, hooks = find_hooks(model)
    for name, prior in hooks.analytic_priors(root, functools.partial(known_message, root, hooks)).items():
        layer = layer_of(root, name)
        targets = layer.mean_innovation, layer.innovation
        beside = layer.prior_offset, layer.prior_log_scale
        if targets[0] is None:
            targets, beside = beside, (None, None)
        if targets[0] is None or targets[1] is None:
            raise ConversionError(
                f"{name} has nothing to calibrate", "Convert with innovation=True, the default, or correction=True."
            )
        if layer.running_mean is None or layer.running_var is None:
            raise ConversionError(f"{name} keeps no population statistics", "Use track_running_stats=True.")
        mean, variance = (values.reshape(-1) for values in prior)
        shift = (layer.running_mean - mean) / (variance + layer.eps).sqrt()
        ratio = torch.log((layer.running_var + layer.eps) / (variance + layer.eps))
        for target, value, other in zip(targets, (shift, ratio), beside, strict=True):
            assert target is not None
            target.copy_(value if other is None else value - other)
        if layer.uncertainty is not None:
            layer.uncertainty.copy_(layer.uncertainty.new_tensor(_KNOWN))
            if layer.computes_gain:
                layer.fixed_gain.zero_()
