"""Instructions for the CPU kernels, the arena that they work in, and the tensors that they read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from bkn_core.graph.expressions import tensor_of
from bkn_core.graph.kernel_tensors import INFLATIONS
from bkn_core.layers.batch_kalman import BatchKalmanNorm

NORM, GIVEN, CONVOLUTION, PATCHES, RELU, ADD, MULTIPLY = range(7)  # as in `program.h`
AFFINE, GATHER, REFINE, AVERAGE, MAX_POOL, GAIN = range(7, 13)
CURVE, CLIPPED, LEAKY, TRANSPOSED, SCALE, SHIFT = range(13, 19)


class NoKernel(Exception):
    """The kernels do not know an operation."""


class Slot(NamedTuple):
    """Where in the arena a message lies."""

    mean: int
    variance: int
    channels: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One step for the kernels: its fixed fields, and the numbers of the tensors that it reads (-1: none)."""

    fields: tuple[int, ...]
    tensors: tuple[int, ...] = ()
    numbers: tuple[float, ...] = ()
    index: tuple[int, ...] = ()


class ProgramBuilder:
    """Instructions while they are being written, the size of their arena, and the tensors that they read.

    Args:
        model: gives the shapes.
        size: of the results, with which the arena begins.
        given: names of nodes whose mean and variance are tensors; they come before the tensors of the model.
    """

    def __init__(self, model: nn.Module, size: int, given: Sequence[int] = ()) -> None:
        self.model, self.size, self.given = model, size, given
        self.instructions: list[Instruction] = []
        self.numbers: dict[tuple[str, str], int] = {}  # of tensors, by the paths of modules and the names in them
        self.shapes: list[torch.Size] = []
        self.moving: set[int] = set()  # numbers of the tensors that change between forward and backward

    def tensor(self, module: str, name: str) -> int:
        """Return the number of a parameter or buffer, -1 where the module has None."""
        tensor = tensor_of(self.model, module, name)
        if tensor is None:
            return -1
        if (module, name) not in self.numbers:
            self.numbers[module, name] = 2 * len(self.given) + len(self.numbers)
            self.shapes.append(tensor.shape)
        return self.numbers[module, name]

    def named(self, path: Any) -> int:
        """Return the number of a tensor by its path, -1 for the empty one."""
        if not path:
            return -1
        if not isinstance(path, str):  # computed from parameters
            raise NoKernel
        module, _, name = path.rpartition(".")
        return self.tensor(module, name)

    def shape(self, number: int) -> torch.Size:
        """Return the shape of a tensor of the model."""
        return self.shapes[number - 2 * len(self.given)]

    def slot(self, channels: int) -> Slot:
        """Return a new slot."""
        start = self.size
        self.size += 2 * channels
        return Slot(start, start + channels, channels)

    def write(self, operation: int, out: Slot, *operands: Slot, **more: Any) -> Slot:
        """Append an instruction, and return the slot of its result."""
        first, second = (*operands, (0, 0, 0), (0, 0, 0))[:2]
        shape = more.pop("shape", (first[2], 1, 1))
        self.instructions.append(
            Instruction((operation, out[2], *out[:2], *first[:2], *second[:2], *shape, 0, 0), **more)
        )
        return out

    def copy(self, message: Slot, out: Slot) -> Slot:
        """Write a message once more."""
        return self.write(AFFINE, out, message, numbers=(1.0, 0.0))

    def refine(self, layer: BatchKalmanNorm, name: str, prior: Slot, out: Slot) -> None:
        """Write the refined prior of a layer."""
        tensors = tuple(self.tensor(name, of) for of in ("prior_offset", "prior_log_scale", *INFLATIONS))
        self.moving.update(number for number in tensors[2:] if number >= 0)
        self.write(REFINE, out, prior, self.slot(prior.channels), tensors=tensors, numbers=(layer.eps,))

    def gain(self, layer: BatchKalmanNorm, name: str, slot: int) -> None:
        """Write the gain of a layer."""
        is_learned = layer.gain_logit is not None
        value = self.tensor(name, "gain_logit" if is_learned else "fixed_gain")
        if layer.computes_gain:
            self.moving.add(value)
        tensors = (value, self.tensor(name, "gain_factor"))
        self.write(GAIN, Slot(slot, slot, 1), tensors=tensors, numbers=(float(is_learned),))
