"""The autograd node of a layer in C++ (`kernels/node.cpp`), around the kernels of `native.py`.

It computes bit for bit what the node in Python does, and spares small activations the time of Python. PyTorch's headers
take a compiler half a minute, so that is done beside the program that first asks for it; until then, and wherever it
fails, the node in Python serves.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bkn_core.norm import native
from bkn_core.norm.compiler import Building, compiler, place

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
_LOG = logging.getLogger("bkn")


@functools.cache
def building() -> Building:
    """Return the library that is compiled, or was."""
    source = Path(__file__).parent / "kernels" / "node.cpp"
    root = Path(torch.__file__).parent
    folders = (root / "include", root / "include" / "torch" / "csrc" / "api" / "include")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = ["-O2", "-std=c++20", "-fPIC", "-shared", abi, *(f"-I{folder}" for folder in folders)]
    links = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    library = place("node", [source, source.with_name("layer.h")], [torch.__version__, *flags])
    return Building(library, [*compiler("CXX", "c++", "g++", "clang++"), *flags, str(source), *links])


@functools.cache
def _loaded(path: Path) -> Callable[..., list[Tensor]] | None:
    kernels = native.library()
    assert kernels is not None
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        _LOG.info("%s cannot be loaded: %s", path.name, error)
        return None
    addresses = (ctypes.cast(kernel, ctypes.c_void_p).value for kernel in (kernels.bkn_forward, kernels.bkn_backward))
    torch.ops.bkn.initialize(*addresses)
    operation: Callable[..., list[Tensor]] = torch.ops.bkn.normalize.default
    return operation


def node() -> Callable[..., list[Tensor]] | None:
    """Return the node, None where there is none or not yet."""
    if native.library() is None:
        return None
    path = building().path()
    return None if path is None else _loaded(path)


def normalize(
    x: Tensor,
    parameters: native.Parameters,
    sensitivity: tuple[Tensor | None, Tensor | None],
    numbers: tuple[float, float],
    groups: int,
) -> list[Tensor] | None:
    """Return y and the statistics (6, G, C) of `fused.py`, None where the node cannot serve.

    Args:
        x: activations.
        parameters: µ', v', gain, γ, β.
        sensitivity: h̄ and the newest one, which the backward moves; None to follow no innovation.
        numbers: ε, and by how much to move the sensitivity.
        groups: of equal size.
    """
    operation = node()
    if operation is None or not _PLAIN.issuperset(map(type, (x, *parameters, *sensitivity))):
        return None
    return operation(x, *parameters, *sensitivity, *numbers, groups) or None
