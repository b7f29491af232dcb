"""What is known of the functions and tensors of a forward that is followed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name
from torch.utils import _pytree as pytree

Arguments = tuple[Sequence[Any], Mapping[str, Any]]


def names(text: str) -> frozenset[str]:
    """Return the names in a text."""
    return frozenset(text.split())


# Functions that return their values as they are.
IDENTITY = names(
    """contiguous clone detach to float half bfloat16 double type requires_grad alias identity dropout dropout1d
    dropout2d dropout3d alpha_dropout feature_alpha_dropout stochastic_depth"""
)

# Functions that lay a tensor's memory open. What is written there leaves no version behind.
MEMORY = names("data numpy array dlpack cuda_array_interface storage untyped_storage data_ptr")

# Functions that make a tensor of numbers alone. What is computed of the input and of those is as good as the input.
CONSTANT = names("tensor as_tensor zeros ones full arange linspace eye")


@dataclasses.dataclass
class Value:
    """What is known of one tensor: a node and the dimension its channels lie along, the input, or a reason.

    Or, where it is computed from parameters alone, their expression (see `expressions`); or, of weights that sum to one
    along a dimension, which one.

    `numbers` holds the channel number of every element where they are spread over several dimensions for a moment, as
    in the middle of a channel shuffle.
    """

    node: int = -1
    dimension: int = 0
    numbers: Tensor | None = None
    is_input: bool = False
    reason: str = ""
    parameter: Any = None
    sums_to_one: int = -1
    tensor: Tensor | None = None
    version: int = 0


class Running(NamedTuple):
    """A module in the middle of its forward: its path, itself and the first tensor it was called with."""

    name: str
    module: nn.Module
    given: Tensor | None


@dataclasses.dataclass(frozen=True)
class Step:
    """One function of the forward.

    Args:
        name: its bare name.
        function: itself.
        arguments: what it was called with.
        operands: what is known of each tensor among them; None for a number that was made in the forward.
        outputs: the tensors that it returned.
    """

    name: str
    function: Callable[..., Any]
    arguments: Arguments
    operands: list[Value | None]
    outputs: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, nested ones too."""
        return tensors(self.arguments)

    @property
    def features(self) -> list[Value]:
        """What is known of the operands that are no parameters."""
        return [v for v in self.operands if v is not None and v.parameter is None]

    @property
    def parameters(self) -> list[Any]:
        """The expressions of the operands that are computed from parameters alone."""
        return [v.parameter for v in self.operands if v is not None and v.parameter is not None]

    def argument(self, position: int, name: str) -> Any:
        """Return an argument that may be given by position or by name."""
        return argument(self.arguments, position, name)

    def known(self, tensor: Any) -> Value | None:
        """Return what is known of one of the tensors."""
        return next((v for t, v in zip(self.tensors, self.operands, strict=True) if t is tensor), None)


def number_channels(value: Value, channels: int) -> Tensor:
    """Return a tensor of the value's shape that holds the channel number of every element."""
    assert value.tensor is not None
    numbers = value.numbers
    if numbers is None:
        shape = [1] * value.tensor.dim()
        shape[value.dimension] = channels
        device = "cpu" if value.tensor.is_meta else value.tensor.device  # they are read, which needs memory
        numbers = torch.arange(channels, device=device).view(shape).expand(value.tensor.shape)
    return numbers.contiguous()  # the original may have been viewed where an expanded tensor cannot


def find_channels(numbers: Tensor, channels: int) -> tuple[int, tuple[int, ...]] | str | None:
    """Read channel numbers after a function moved them.

    Returns:
        The dimension along which they vary and their order there, None where they vary along several, or why they are
        lost.
    """
    if numbers.numel() == 0:
        return "an empty tensor"
    varying = [d for d in range(numbers.dim()) if numbers.shape[d] > 1 and bool((numbers.diff(dim=d) != 0).any())]
    if len(varying) > 1:
        return None
    if not varying and channels > 1:
        return "a single channel taken out"
    dimension = varying[0] if varying else min(1, numbers.dim() - 1)
    rows = numbers.movedim(dimension, -1)
    return dimension, tuple((rows.flatten(0, -2)[0] if rows.dim() > 1 else rows).tolist())


def argument(arguments: Arguments, position: int, name: str) -> Any:
    """Return an argument that may be given by position or by name."""
    args, kwargs = arguments
    return args[position] if len(args) > position else kwargs.get(name)


def tensors(arguments: Arguments) -> list[Tensor]:
    """Return all tensors among the arguments, nested ones too."""
    return [t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor)]


def name_of(function: Callable[..., Any]) -> str:
    """Return the bare name of a function that PyTorch reports: "add" for `torch.Tensor.__iadd__` and `torch.add`."""
    name = str(resolve_name(function) or getattr(function, "__name__", function)).split(".")
    bare = name[-2] if name[-1] in ("__get__", "__set__") else name[-1]
    if bare.startswith("__") and bare.endswith("__"):
        bare = bare.strip("_")
        for prefix in ("i", "r"):
            if bare[:1] == prefix and bare[1:] in ("add", "mul", "sub", "truediv", "div"):
                bare = ("reversed_" if prefix == "r" else "") + bare[1:]
        return bare
    return bare.strip("_").removesuffix("_with_indices")
