"""Measure the patches that a model's first layers read from the network input: the exact prior of what follows them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bkn_core.errors import ConversionError
from bkn_core.graph.entry import entered
from bkn_core.graph.graph import Graph

INPUT_MEAN, INPUT_COVARIANCE = "input_mean", "input_covariance"  # buffers of a layer that reads the input
_LARGEST_COVARIANCE = 1024  # wider patches keep variances only


def input_modules(graph: Graph) -> Iterator[str]:
    """Yield the names of the layers that read the network input and whose patches priors need."""
    seen = set()
    for node in graph.nodes:
        if node.operation in ("patches", "measured"):
            name = node.options[1] if node.operation == "patches" else node.name
            if name not in seen:
                seen.add(name)
                yield name


def reserve_input_moments(module: nn.Module) -> None:
    """Register empty moments on a layer that reads the network input, for measuring or for loading a checkpoint."""
    width = _patch_width(module)
    like = next(itertools.chain(module.parameters(), module.buffers()))
    zeros = torch.zeros(width, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    shape = (width, width) if width <= _LARGEST_COVARIANCE else (width,)
    module.register_buffer(INPUT_MEAN, zeros)
    module.register_buffer(INPUT_COVARIANCE, zeros.new_zeros(shape))


def remove_input_moments(module: nn.Module) -> None:
    """Take the moments off a layer again."""
    for name in (INPUT_MEAN, INPUT_COVARIANCE):
        module._buffers.pop(name, None)


def measure_input(model: nn.Module, graph: Graph, images: Any) -> None:
    """Measure mean p and covariance P of the input patches over training images, zero padding included.

    Args:
        model: changed in place: the layers that read the input get buffers.
        graph: of the model.
        images: a batch, or batches, as the model sees them; a batch of several arguments is a tuple or dict of them.

    Shape:
        p (d,), P (d, d), or (d,) for patches of more than 1024 values; d = values per patch.

    Raises:
        ConversionError: without any image, or for batches that the model does not take.
    """
    batches = [images] if isinstance(images, Tensor | dict) else images
    if not isinstance(batches, Iterable):
        raise ConversionError(f"input_prior is {images!r}", "Give a batch of training images, or a list of batches.")
    sums: dict[str, _PatchSums] = {}
    remaining: set[str] = set()
    handles = []
    for name in input_modules(graph):
        module = model.get_submodule(name)
        reserve_input_moments(module)
        sums[name] = _PatchSums(name, module, remaining)
        handles.append(module.register_forward_pre_hook(sums[name]))
    training = {name: module.training for name, module in model.named_modules()}
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                remaining.update(sums)
                with contextlib.suppress(_AllSeen):
                    entered(model, batch, "a batch of input_prior")
    finally:
        for handle in handles:
            handle.remove()
        for name, module in model.named_modules():
            module.training = training[name]
    for name, total in sums.items():
        if total.count == 0:
            raise ConversionError(
                "input_prior holds no image", "Give a batch of training images as the model sees them."
            )
        module = model.get_submodule(name)
        module.get_buffer(INPUT_MEAN).copy_(total.mean())
        module.get_buffer(INPUT_COVARIANCE).copy_(total.covariance())


class _AllSeen(BaseException):
    """Ends a forward of which nothing more is needed."""


class _PatchSums:
    """A forward pre-hook that adds up the patches which a layer reads, in float64 about the first batch's mean."""

    def __init__(self, name: str, module: nn.Module, remaining: set[str]) -> None:
        self.name, self.remaining = name, remaining
        self.count, self.width = 0, _patch_width(module)
        self.matrix = self.width <= _LARGEST_COVARIANCE
        self.shift = self.first = self.second = torch.zeros(())

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        patches = _patches(module, arguments[0]).double()
        if patches.shape[1:] != (self.width,):
            raise ConversionError(
                f"{self.name} reads {self.width} values of each patch, a batch of input_prior has {patches.shape[1]}",
                "Give training images as the model sees them.",
            )
        if self.count == 0:
            self.shift = patches.mean(0)
        patches = patches - self.shift
        self.first = self.first + patches.sum(0)
        self.second = self.second + (patches.T @ patches if self.matrix else patches.square().sum(0))
        self.count += len(patches)
        self.remaining.discard(self.name)
        if not self.remaining:
            raise _AllSeen

    def mean(self) -> Tensor:
        return self.shift + self.first / self.count

    def covariance(self) -> Tensor:
        rest = self.first / self.count
        return self.second / self.count - (torch.outer(rest, rest) if self.matrix else rest.square())


def _patch_width(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return int(module.num_features)
    assert isinstance(weight, Tensor)
    return weight[0].numel()


def _patches(module: nn.Module, x: Tensor) -> Tensor:
    """Lay out what each output position reads: (positions, d), d in the order of the flattened weight."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return x.movedim(1, -1).flatten(0, -2)
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        x = F.pad(
            x,
            module._reversed_padding_repeated_twice,
            "constant" if module.padding_mode == "zeros" else module.padding_mode,
        )
    else:
        x = F.pad(x, [side for p in reversed(module.padding) for side in (p, p)])
    for i, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        x = x.unfold(2 + i, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    axes = len(module.kernel_size)
    return x.movedim(1, 1 + axes).flatten(1 + axes).flatten(0, axes)
