"""Find modules of a model by their paths at every forward: by walking once, then by checking that nothing has moved."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bkn_core.errors import ConversionError

_Edge = tuple[dict[str, nn.Module | None], str, nn.Module]


class Entries:
    """Entries of dictionaries, and whether they still are what they were.

    Args:
        entries: dictionary, key and value of each.
    """

    def __init__(self, entries: Iterable[tuple[dict[str, Any], str, Any]]) -> None:
        known = list(entries)
        self.holders = [holder for holder, _, _ in known]
        self.keys = [key for _, key, _ in known]
        self.values = [value for _, _, value in known]

    def are_kept(self) -> bool:
        """Whether every value is in its place."""
        return all(map(operator.is_, map(dict.get, self.holders, self.keys), self.values))


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return a model and all that it holds: `model.modules()`, which calls itself for every module, faster."""
    found: dict[nn.Module, None] = {}
    ahead: list[nn.Module | None] = [model]
    while ahead:
        module = ahead.pop()
        if module is not None and module not in found:
            found[module] = None
            if module._modules:
                ahead += reversed(module._modules.values())
    return list(found)


class Lookup:
    """Modules by path. What was found is trusted as long as every step of every path still leads to the same module.

    Args:
        paths: of the modules, as `nn.Module.get_submodule` takes them.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = tuple(paths)
        self._found: tuple[Entries, list[nn.Module]] | None = None

    def __reduce__(self) -> tuple[type[Lookup], tuple[tuple[str, ...]]]:
        """Copies look again."""
        return Lookup, (self.paths,)

    def __call__(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules in the order of the paths.

        Raises:
            ConversionError: the model was changed after its conversion.
        """
        if self._found is not None and not torch.compiler.is_compiling():
            entries, modules = self._found
            if entries.holders[0] is model._modules and entries.are_kept():
                return modules
        try:
            modules = [model.get_submodule(path) for path in self.paths]
        except AttributeError as error:
            raise ConversionError(
                f"a layer is not where it was at conversion: {error}", "Change the model first, then convert it again."
            ) from error
        if all(self.paths) and self.paths and not torch.compiler.is_compiling():
            self._found = Entries(self._edges(model)), modules
        return modules

    def _edges(self, model: nn.Module) -> list[_Edge]:
        """Return every step of the paths, those of the model itself first. Dictionaries of children, so that nothing
        here keeps the model alive."""
        edges: dict[str, _Edge] = {}
        for path in self.paths:
            module, walked = model, ""
            for name in path.split("."):
                walked = f"{walked}.{name}"
                child = module.get_submodule(name)
                edges.setdefault(walked, (module._modules, name, child))
                module = child
        return list(edges.values())
