"""Which implementation computes: PyTorch, C on the CPU or Triton on a GPU.

`BKN_BACKEND` in the environment forces one: `torch`, `cpu`, `triton`, or `auto`, the default, which takes C for tensors
of the CPU and Triton for those of a GPU. What an implementation cannot take goes through PyTorch. `BKN_NATIVE=0` is an
older way to say `BKN_BACKEND=torch`. With `TRITON_INTERPRET=1`, `triton` serves tensors of the CPU as well, slowly.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from bkn_core.errors import RecipeError
from bkn_core.ops.activation_rows import is_channels_last

BACKENDS = ("auto", "torch", "cpu", "triton")
_ACTIVATIONS = (torch.float32, torch.float16, torch.bfloat16)
_MOST = 1 << 31  # values that an offset reaches
_LOG = logging.getLogger("bkn")


@functools.cache
def chosen() -> str:
    """Return the implementation that the environment asks for.

    Raises:
        RecipeError: there is no such implementation.
    """
    name = os.environ.get("BKN_BACKEND", "").strip().lower() or "auto"
    if name not in BACKENDS:
        raise RecipeError(
            f"BKN_BACKEND={name} in the environment: no such backend", f"take one of {', '.join(BACKENDS)}"
        )
    return "torch" if os.environ.get("BKN_NATIVE") == "0" and name == "auto" else name


def takes_cpu_kernels() -> bool:
    """Whether the kernels in C may be used."""
    return chosen() in ("auto", "cpu")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def takes_triton(device: str) -> bool:
    """Whether the kernels in Triton may be used for tensors of such a device; compilation takes this for granted."""
    if chosen() not in ("auto", "triton") or (device == "cpu" and chosen() == "auto"):
        return False
    return triton_works(device)


def triton_takes(x: Tensor, vectors: Sequence[Tensor | None]) -> bool:
    """Whether the kernels in Triton take an activation and the vectors of its channels."""
    if x.dtype not in _ACTIVATIONS or not takes_triton(x.device.type):
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    if not (x.is_contiguous() or is_channels_last(x)) or not 0 < x.numel() < _MOST:
        return False
    return all(t is None or (t.dtype is torch.float32 and t.device == x.device and t.is_contiguous()) for t in vectors)


def is_capturing() -> bool:
    """Whether launches are captured in a CUDA graph, whose replays must read no memory of the host that is gone."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@functools.cache
def triton_works(device: str) -> bool:
    """Whether Triton is there and makes kernels that run: it needs a C compiler beside the GPU."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cpu" and not is_interpreted:
        _LOG.warning("BKN_BACKEND=triton has nothing for the CPU but with TRITON_INTERPRET=1: PyTorch does the work")
    if device not in ("cuda", "cpu") or (device == "cpu") is not is_interpreted:
        return False
    try:
        from bkn_core.ops.cuda import normalize

        x = torch.ones(2, 1, 2, device=device)
        normalize.normalize(x, None, None, torch.ones((), device=device), None, None, 1.0, 1)
    except Exception as error:  # of many kinds: no module, no compiler, a GPU that is too old
        _LOG.warning("Triton's kernels cannot be used, PyTorch does the work more slowly: %s", error)
        return False
    return True
