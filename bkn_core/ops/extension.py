"""Calls of the kernels of `kernels.py` in C++ (`cpu/extension.cpp`): the autograd node of a layer above all.

They do bit for bit what Python does, and spare small activations the time of Python. PyTorch's headers take a compiler
half a minute, so that is done beside the program that first asks for it; until then, and wherever it fails, Python
serves.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bkn_core.ops import kernels
from bkn_core.ops.compiler import Building, Source

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
_LIMIT = 900.0  # seconds that the compiler may take, which takes half a minute of a core
_LOG = logging.getLogger("bkn")

Tensors = tuple[Tensor | None, ...]


class Program(Protocol):
    """The program of all priors and gains of a model, see `cpu/priors.h`."""

    def predict(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return its results."""


class SharedRow(Protocol):
    """All priors and gains of a model, see `cpu/shared_row.h`."""

    def parts(self) -> tuple[Tensor, list[Tensor]]:
        """Return the row and its pieces."""

    def begin(self) -> bool:
        """Fill the row, and return whether that could be done."""

    def finish(self) -> bool:
        """Pass its gradient on, and return whether nothing has changed that it was filled from."""


class Operations(NamedTuple):
    """What `extension.cpp` offers."""

    normalize: Callable[..., list[Tensor]]
    track: Callable[..., list[Tensor] | None]
    program: Callable[..., Program]
    row: Callable[..., SharedRow]


@functools.cache
def building() -> Building:
    """Return the library that is compiled, or was."""
    folder, root = Path(__file__).parent / "cpu", Path(torch.__file__).parent
    folders = (root / "include", root / "include" / "torch" / "csrc" / "api" / "include")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    made_for = f'-DBKN_TORCH="{torch.__version__}"'  # another PyTorch, another library
    flags = ["-O2", "-std=c++20", "-fPIC", "-shared", abi, made_for, *(f"-isystem{folder}" for folder in folders)]
    links = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    headers = [folder / name for name in ("calls.h", "once.h", "priors.h", "shared_row.h", "track.h")]
    source = Source("extension", "CXX", ("c++", "g++", "clang++"), [folder / "extension.cpp"], headers, flags, links)
    return Building(source, _LIMIT, niceness=10)


@functools.cache
def _loaded(path: Path) -> Operations | None:
    library = kernels.library()
    assert library is not None
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        _LOG.warning("%s cannot be loaded, Python does its work more slowly: %s", path.name, error)
        return None
    names = ("forward", "backward", "track", "evaluate", "reverse")
    called = [getattr(library, f"bkn_{name}") for name in names]
    made = torch.ops.bkn
    made.initialize(*(ctypes.cast(kernel, ctypes.c_void_p).value for kernel in called))
    classes = torch.classes.bkn
    return Operations(made.normalize.default, made.track.default, classes.Program, classes.SharedRow)


def operations() -> Operations | None:
    """Return what C++ offers, None where there is none or not yet."""
    if kernels.library() is None:
        return None
    known = building()  # of which every layer asks
    path = known.library if known.is_made else known.path()
    return None if path is None else _loaded(path)


def are_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether none of the tensors is of a class of its own."""
    return _PLAIN.issuperset(map(type, tensors))


def normalize(
    x: Tensor,
    parameters: kernels.Parameters,
    sensitivity: tuple[Tensor | None, Tensor | None],
    eps: float,
    groups: int,
) -> list[Tensor] | None:
    """Return y and the statistics (6, G, C) of `normalize.py`, None where the node cannot serve.

    Args:
        x: activations.
        parameters: µ', v', gain, γ, β.
        sensitivity: h̄ (2, C), and the sums (3, C) that the backward adds to; None to follow no inflation.
        eps: ε.
        groups: of equal size.
    """
    compiled = operations()
    if compiled is None or not are_plain((x, *parameters, *sensitivity)):
        return None
    return compiled.normalize(x, *parameters, *sensitivity, eps, groups) or None


def track(rows: Sequence[Tensors], numbers: Sequence[float], *, is_alone: bool) -> list[Tensor] | None:
    """Move what layers remember and return their inflations of variance and mean as they were, by turns; None where
    that cannot be done here.

    Args:
        rows: statistics, µ', v' and the tensors of `LayerState`, of each observation; None for what a layer has not.
        numbers: least speed of the inflations, weight of the newest statistics, ε, of each observation.
        is_alone: whether no two observations are of one layer.
    """
    compiled = operations()
    tensors = [tensor for row in rows for tensor in row if tensor is not None]
    if compiled is None or not are_plain(tensors):
        return None
    flags = ((1, 1), (10, 2), (12, 4), (9, 8))
    forms = [sum(flag for at, flag in flags if row[at] is not None) for row in rows]
    return compiled.track(tensors, forms, numbers, is_alone)
