"""Normalization by the statistics of a reference batch that goes through the network beside every other batch."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bkn_core.errors import ConversionError
from bkn_core.layers.rivals.groups import Rival, spread, wide
from bkn_core.layers.surgery import copied

REFERENCE_IMAGES = 64
_IMAGES = "reference_images"
Model = TypeVar("Model", bound=nn.Module)


class ReferenceNorm(Rival):
    """Normalize by the statistics of the reference images, which come first in a batch.

        y = γ (x - µ_R) / sqrt(v_R + ε) + β

    The gradient flows through µ_R and v_R. Training and evaluation do the same.

    Args:
        num_features: C.
        eps: ε.

    Shape:
        x (R + N, C, *spatial) -> the same.

    Reference:
        Salimans et al., "Improved Techniques for Training GANs" (virtual batch normalization), 1606.03498.
    """

    kind = "reference"

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps, None)
        self.rows = 0  # reference images in this forward

    def forward(self, x: Tensor) -> Tensor:
        """Observe the reference images and normalize all."""
        assert self.running_mean is not None and self.running_var is not None
        values = wide(x)
        mean, variance = self.running_mean, self.running_var
        if self.rows:
            axes = [i for i in range(x.dim()) if i != 1]
            variance, mean = torch.var_mean(values[: self.rows], axes, correction=0)
            with torch.no_grad():
                self.running_mean.copy_(mean)
                self.running_var.copy_(variance)
        scale = self.weight / (variance + self.eps).sqrt()
        y: Tensor = (values - spread(mean[None], x)) * spread(scale[None], x) + spread(self.bias[None], x)
        return y.to(x.dtype)


class Companion:
    """A forward pre-hook that puts the reference images before those of a batch."""

    def __call__(self, model: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Lengthen the batch."""
        if not arguments or not isinstance(arguments[0], Tensor):
            raise ConversionError(
                f"{type(model).__name__} was called without a tensor of images in the first place",
                "A model with norm kind reference takes them as model(images).",
            )
        images = model.get_buffer(_IMAGES)
        _set_rows_(model, len(images))
        return (torch.cat([images.to(arguments[0].dtype), arguments[0]]), *arguments[1:])


class Dismissal:
    """A forward hook that takes the reference images' results off again."""

    def __call__(self, model: nn.Module, _: Any, output: Any) -> Any:
        """Shorten what the model returns."""
        _set_rows_(model, 0)
        count = len(model.get_buffer(_IMAGES))
        return pytree.tree_map(lambda value: value[count:] if isinstance(value, Tensor) else value, output)


def _set_rows_(model: nn.Module, count: int) -> None:
    for layer in model.modules():
        if isinstance(layer, ReferenceNorm):
            layer.rows = count


def attach_reference_(model: nn.Module, images: Tensor) -> None:
    """Let a model, in place, carry reference images: they are in its state dict and go through every forward.

    Args:
        model: with `ReferenceNorm` layers.
        images: (R, C, *spatial), of which at most 64 are kept.
    """
    model.register_buffer(_IMAGES, images[:REFERENCE_IMAGES].detach().clone())
    model.register_forward_pre_hook(Companion())
    model.register_forward_hook(Dismissal(), always_call=True)


def has_reference(model: nn.Module) -> bool:
    """Whether a model carries reference images."""
    return any(isinstance(hook, Companion) for hook in model._forward_pre_hooks.values())


def settled(model: Model) -> Model:
    """Return a model whose layers hold the reference statistics of its present weights, without the images.

    A copy; the model itself where it carries no reference.
    """
    if not any(has_reference(module) for module in model.modules()):
        return model
    replica = copied(model).eval()
    for module in replica.modules():
        if has_reference(module):
            with torch.no_grad():
                module(module.get_buffer(_IMAGES)[:1])
            module._buffers.pop(_IMAGES)
            for hooks, kind in ((module._forward_pre_hooks, Companion), (module._forward_hooks, Dismissal)):
                for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
                    hooks.pop(key)
                    module._forward_hooks_always_called.pop(key, None)
    for new, old in zip(replica.modules(), model.modules(), strict=True):
        new.training = old.training
    return replica
