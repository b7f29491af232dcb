"""What layers do to small vectors, done for many layers at once: a few operations on all channels, not a few per layer.

A network has dozens of normalization layers, and an operation on a vector of channels costs its overhead, not its
arithmetic. Vectors of layers that are alike are laid side by side, computed on, and split again.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """Return the positions of equal keys, in the order of their first appearance."""
    if len(keys) == 1:
        return [[0]]  # whose key may hold sizes of an exported graph, which cannot be compared
    found: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return list(found.values())


def beside(vectors: Sequence[Tensor]) -> Tensor:
    """Lay vectors side by side."""
    return vectors[0] if len(vectors) == 1 else torch.cat(list(vectors), -1)


def existing(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the tensors that are there."""
    return [tensor for tensor in tensors if tensor is not None]


def apart(values: Tensor, widths: Sequence[int]) -> Sequence[Tensor]:
    """Split what lies side by side."""
    return (values,) if len(widths) == 1 else torch.split(values, list(widths), -1)
