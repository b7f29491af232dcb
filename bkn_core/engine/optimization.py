"""The optimizer, its parameter groups and what changes with the step, as pure functions of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bkn_core.layers.schedule import anneal_gain_
from bkn_core.recipe import OptimConfig, Recipe

_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(model: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """Build the optimizer: weight decay on weights, its own on normalization and biases, its own rate on gains."""
    weights: list[nn.Parameter] = []
    norms: list[nn.Parameter] = []
    gains: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if name == "gain_logit":
                gains.append(parameter)
            else:
                (norms if isinstance(module, _NORMS) or parameter.dim() < 2 else weights).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": list(dict.fromkeys(weights)), "weight_decay": config.weight_decay, "scale": 1.0},
        {"params": list(dict.fromkeys(norms)), "weight_decay": config.norm_weight_decay, "scale": 1.0},
        {"params": list(dict.fromkeys(gains)), "weight_decay": 0.0, "scale": config.gain_lr_scale},
    ]
    groups = [group for group in groups if group["params"]]
    fused = device.type in ("cpu", "cuda")  # one call for all parameters
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=fused)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step (counted from 0) out of `steps`.

    onecycle: from lr/25 up to lr over the warm-up by a half cosine, then down to lr/10⁵; cosine: linear warm-up, then
    half a cosine to 0; multistep: linear warm-up, then lr·gamma after each milestone; constant: linear warm-up, lr.
    """
    warmup = config.warmup * steps
    if config.schedule == "onecycle":
        if step < warmup:
            return config.lr * _cosine(1 / 25, 1.0, step / warmup)
        return config.lr * _cosine(1.0, 1e-5, (step - warmup) / max(1.0, steps - 1 - warmup))
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "cosine":
        return config.lr * _cosine(1.0, 0.0, (step - warmup) / max(1.0, steps - warmup))
    if config.schedule == "multistep":
        return config.lr * float(config.gamma ** sum(step >= m * steps for m in config.milestones))
    return config.lr


def _cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(part, 1.0))) / 2


def set_step_(optimizer: torch.optim.Optimizer, model: nn.Module, recipe: Recipe, *, step: int, steps: int) -> float:
    """Set the learning rate and the gain factor of a step, in place, and return the rate."""
    rate = learning_rate(recipe.optim, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    if recipe.norm.kind == "bkn" and recipe.norm.gain_schedule == "anneal":
        anneal_gain_(model, step / steps)
    return rate


def average_weights(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """Return the moving average of a model's weights, if there is a decay; its statistics follow the model's own."""
    if decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).eval()  # type: ignore[no-untyped-call]
