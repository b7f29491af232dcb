"""What stands directly before and behind each normalization layer: one example forward, the model untouched."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bkn_core.graph.entry import entered
from bkn_core.layers.rivals.response import EvoNorm, FilterResponseNorm
from bkn_core.layers.surgery import copied

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, FilterResponseNorm, EvoNorm)


@dataclasses.dataclass
class Neighbours:
    """The modules around the normalization layers of a model, by their paths.

    Args:
        before: the convolution or linear layer whose output a layer reads as it is.
        behind: the `nn.ReLU` that alone reads a layer's output, and reads nothing else.
        positions: values per channel of one image.
        order: the layers as they run.
    """

    before: dict[str, str] = dataclasses.field(default_factory=dict)
    behind: dict[str, str] = dataclasses.field(default_factory=dict)
    positions: dict[str, int] = dataclasses.field(default_factory=dict)
    order: list[str] = dataclasses.field(default_factory=list)


@torch.inference_mode(mode=False)
def neighbours(model: nn.Module, example_input: Any) -> Neighbours:
    """Run one forward on a copy of the model in evaluation mode and return what stands where.

    Args:
        model: a model with normalization layers.
        example_input: a tensor, or a tuple or dict of the forward's arguments.

    Raises:
        ConversionError: the forward fails on the example.
    """
    replica = copied(model).eval()
    watch = _Watch()
    for name, module in replica.named_modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # whose result would be the tensor that it reads
        if isinstance(module, (*_NORMS, _ConvNd, nn.Linear, nn.ReLU)):
            module.register_forward_pre_hook(watch.entering(name))
            module.register_forward_hook(watch.leaving(name))
    with torch.random.fork_rng(devices=[]), torch.no_grad(), watch:
        watch.note(entered(replica, example_input, "example_input"))
    return watch.found()


class _Watch(TorchFunctionMode):
    """Who makes and who reads the tensors around normalization layers."""

    def __init__(self) -> None:
        super().__init__()
        self.makers: dict[int, tuple[str, nn.Module, Tensor]] = {}  # with the tensor, whose identity stays its own
        self.calls: Counter[str] = Counter()
        self.readers: Counter[str] = Counter()
        self.read: dict[str, str] = {}
        self.seen = Neighbours()

    def entering(self, name: str) -> Callable[[nn.Module, Any], None]:
        """Return a hook that notes what a module reads."""

        def enter(module: nn.Module, arguments: Any) -> None:
            self.calls[name] += 1
            maker, made_by, _ = self.makers.get(id(arguments[0]), ("", None, None))
            if isinstance(module, _NORMS):
                self.seen.order.append(name)
                self.seen.positions[name] = arguments[0].shape[2:].numel()
                if isinstance(made_by, _ConvNd | nn.Linear):
                    self.seen.before[name] = maker
            elif isinstance(module, nn.ReLU) and isinstance(made_by, _BatchNorm):
                self.read[maker] = name

        return enter

    def leaving(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """Return a hook that notes what a module made."""

        def leave(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self.makers[id(output)] = (name, module, output)

        return leave

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count who reads what a normalization layer made, and run the function."""
        if getattr(func, "__name__", "") != "__get__":  # a shape
            self.note((args, kwargs))
        return func(*args, **(kwargs or {}))

    def note(self, read: Any) -> None:
        """Count those among nested values that a normalization layer made."""
        for tensor in pytree.tree_leaves(read):
            maker, made_by, _ = self.makers.get(id(tensor), ("", None, None))
            if isinstance(made_by, _BatchNorm):
                self.readers[maker] += 1

    def found(self) -> Neighbours:
        """Return what was seen, without what is used twice."""
        seen = self.seen
        seen.order = [name for name in dict.fromkeys(seen.order) if self.calls[name] == 1]
        seen.before = {norm: layer for norm, layer in seen.before.items() if self.calls[norm] == self.calls[layer] == 1}
        seen.behind = {
            norm: layer
            for norm, layer in self.read.items()
            if self.calls[norm] == self.calls[layer] == self.readers[norm] == 1
        }
        return seen
