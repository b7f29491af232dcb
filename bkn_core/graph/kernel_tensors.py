"""The parameters and buffers that the CPU kernels read to compute the priors; checked, for kernels trust any tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bkn_core.graph.expressions import is_computed_by_hook
from bkn_core.graph.lookup import Entries, Lookup
from bkn_core.layers.forward import is_recomputation

# Of a forward that may be a repeated one, and their buffers, which every other forward reads.
INFLATIONS = {"present_inflation": "innovation", "present_mean_inflation": "mean_innovation"}


class _Checked(NamedTuple):
    """Tensors that the kernels can take, and how to see that they still are the model's, where and as they were."""

    modules: Sequence[nn.Module]
    entries: Entries
    addresses: list[int]
    weights: list[Tensor]
    layouts: list[tuple[int, ...]]  # of the weights

    def is_unmoved(self) -> bool:
        """Whether every tensor has its values where they were, in the same layout."""
        return (
            list(map(Tensor.data_ptr, self.entries.values)) == self.addresses
            and list(map(Tensor.stride, self.weights)) == self.layouts
        )


class KernelTensors:
    """Tensors of a model by the paths of their modules and their names. What was found good is known again.

    Args:
        paths: of the module, and the name in it.
        shapes: that they must have.
        takes: whether the kernels can read a tensor.
    """

    def __init__(
        self, paths: Sequence[tuple[str, str]], shapes: Sequence[torch.Size], takes: Callable[[Tensor], bool]
    ) -> None:
        self.takes = takes
        self.lookup = Lookup(dict.fromkeys(module for module, _ in paths))
        entries = {path: i for i, path in enumerate(self.lookup.paths)}
        self.wanted = [(entries[module], name, shape) for (module, name), shape in zip(paths, shapes, strict=True)]
        self._checked: _Checked | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies look again."""
        return {**self.__dict__, "_checked": None}

    def __call__(self, model: nn.Module) -> Entries | None:
        """Return the tensors and where they are, in the order of the paths; the same object as long as they stay, None
        where the kernels cannot take them.
        """
        checked, is_repeated = self._checked, is_recomputation()
        if checked is not None and not is_repeated and self.known(model) is not None and checked.is_unmoved():
            return checked.entries
        checked = _check(self.lookup(model), self.wanted, self.takes, is_repeated)
        is_kept = checked is not None and not is_repeated and all(tensor.is_leaf for tensor in checked.entries.values)
        self._checked = checked if is_kept else None  # a tensor with a graph is not kept alive
        return None if checked is None else checked.entries

    def known(self, model: nn.Module) -> Entries | None:
        """Return the tensors that were found good, as long as the model has them where they were."""
        checked = self._checked
        is_kept = checked is not None and self.lookup(model) is checked.modules and checked.entries.are_kept()
        return checked.entries if is_kept and checked is not None else None


def _check(
    modules: Sequence[nn.Module],
    wanted: Sequence[tuple[int, str, torch.Size]],
    takes: Callable[[Tensor], bool],
    is_repeated: bool,
) -> _Checked | None:
    found: list[tuple[dict[str, Any], str, Tensor]] = []
    for owner, name, shape in wanted:
        module = modules[owner]
        if name in INFLATIONS and not is_repeated:
            name = INFLATIONS[name]
        holder = module._parameters if name in module._parameters else module._buffers
        tensor = holder.get(name)
        if tensor is None and is_computed_by_hook(module, name):
            return None
        if tensor is None:  # what is computed: a parametrized weight, the inflation of a recomputed forward
            tensor = getattr(module, name, None)
        if tensor is None or tensor.shape != shape or not takes(tensor):
            return None
        if found and tensor.device != found[0][2].device:
            return None
        found.append((holder, name, tensor if _is_dense(tensor) else tensor.contiguous()))
    entries = Entries(found)
    weights = [tensor for tensor in entries.values if tensor.dim() > 1]
    addresses, layouts = [t.data_ptr() for t in entries.values], [t.stride() for t in weights]
    return _Checked(modules, entries, addresses, weights, layouts)


def _is_dense(tensor: Tensor) -> bool:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    return tensor.is_contiguous() or (last is not None and tensor.is_contiguous(memory_format=last))
