"""CPU kernels: the C files of `cpu`, compiled once by the machine's C compiler. Without one PyTorch does the work.

The library is kept in the user's cache directory; `backend.py` says when it is used. On the CPU only: activations in
float32, bfloat16 or float16, all else in float32. Everything else, and everything that is traced or compiled, takes the
path in PyTorch.
"""

from __future__ import annotations

import array
import ctypes
import functools
import logging
import os
import struct
from pathlib import Path

import torch
from torch import Tensor

from bkn_core.filter.autograd import is_eager
from bkn_core.ops import backend
from bkn_core.ops.compiler import Building, Source

_FLAGS = ("-O3", "-fPIC", "-shared", "-fopenmp-simd", "-fno-math-errno")
_LIMIT = 120.0  # seconds that the compiler may take, which takes a few of a core
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of activations, as in `cpu/calls.h`
_LOG = logging.getLogger("bkn")

ToPrior = tuple[Tensor | None, Tensor | None, Tensor | None]  # gradients of µ', v' and the gain
Gradients = tuple[Tensor, ToPrior, Tensor | None, Tensor]  # of x, of the prior and the gain, of γ, of β
Shape = tuple[int, ...]  # groups, images in each, channels, length, channels last?, threads, type
Parameters = tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None]  # µ', v', gain, γ, β


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where they cannot be had."""
    if not backend.takes_cpu_kernels() or os.name != "posix":
        return None
    folder = Path(__file__).parent / "cpu"
    files, headers = sorted(folder.glob("*.c")), sorted(folder.glob("*.h"))
    path = Building(Source("native", "CC", ("cc", "gcc", "clang"), files, headers, _FLAGS, ["-lm"]), _LIMIT).wait()
    try:
        return None if path is None else _loaded(path)
    except (OSError, AttributeError) as error:
        _LOG.warning("the CPU kernels cannot be loaded, PyTorch does the work more slowly: %s", error)
        return None


def _loaded(path: Path) -> ctypes.CDLL:
    kernels, everything = ctypes.CDLL(str(path)), ctypes.CDLL(None)
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")  # of the OpenMP that PyTorch has loaded
    kernels.bkn_initialize(*(ctypes.cast(getattr(everything, name), ctypes.c_void_p) for name in names))
    for kernel in (
        kernels.bkn_forward,
        kernels.bkn_backward,
        kernels.bkn_evaluate,
        kernels.bkn_reverse,
        kernels.bkn_track,
    ):
        kernel.argtypes = (ctypes.c_void_p,)
    return kernels


def are_usable() -> bool:
    """Whether the kernels can be called now: they are there, and nothing is traced or transformed."""
    return is_eager() and library() is not None


def shape_of(
    x: Tensor, parameters: Parameters, groups: int, sensitivity: tuple[Tensor | None, ...] = ()
) -> Shape | None:
    """Return how the kernels see an activation, None where they cannot take these tensors: they trust every type,
    layout and shape.
    """
    if not are_usable() or not is_array(x, *_TYPES):
        return None
    layout, size, dimensions = _layout(x), x.numel(), x.shape
    if not layout or not size:
        return None
    images, channels = dimensions[0], dimensions[1]
    for tensor in (*parameters, *sensitivity):
        if tensor is not None and not (is_plain(tensor) and tensor.is_contiguous()):
            return None
    prior_mean, prior_variance, gain, weight, bias = parameters
    vector = dimensions[1:2]
    if gain.dim() or any(t is not None and t.shape != vector for t in (weight, bias)):
        return None
    if any(t is not None and t.shape != (rows, channels) for rows, t in zip((2, 3), sensitivity, strict=False)):
        return None
    if prior_mean is not None and prior_variance is not None:
        wide = prior_mean.shape
        if wide != prior_variance.shape or wide not in (vector, (groups, channels)):
            return None
    length, threads = size // (images * channels), torch.get_num_threads()
    return groups, images // groups, channels, length, layout - 1, threads, _TYPES[x.dtype]


def is_array(tensor: Tensor, *types: torch.dtype) -> bool:
    """Whether a tensor is an array of one of these types in the machine's memory and no stand-in for one."""
    kind = type(tensor)
    return (kind is Tensor or kind is torch.nn.Parameter) and tensor.is_cpu and tensor.dtype in types


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is such an array of float32."""
    return is_array(tensor, torch.float32)


def _layout(x: Tensor) -> int:
    """Return 1 for channels first, 2 for channels last (which rows of channels are as well), 0 for anything else."""
    if x.is_contiguous():
        return 1 if x.dim() > 2 else 2
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return 2
    return 2 if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d) else 0


def address(tensor: Tensor | None) -> int:
    """Return where a tensor's values begin, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def normalize(x: Tensor, parameters: Parameters, eps: float, shape: Shape) -> tuple[Tensor, Tensor]:
    """Return y and the statistics (6, G, C) of `normalize.py`."""
    prior_mean, prior_variance, gain, weight, bias = parameters
    y, statistics = torch.empty_like(x), gain.new_empty((6, shape[0], shape[2]))
    slots = [*shape, *map(address, (x, prior_mean, prior_variance)), _stride(prior_mean)]
    run("bkn_forward", [*slots, *map(address, (gain, weight, bias, y, statistics)), bits_of(eps), *[0] * 5])
    return y, statistics


def normalize_backward(
    gradients: tuple[Tensor, Tensor | None],
    saved: tuple[Tensor | None, ...],
    sensitivity: tuple[Tensor | None, Tensor | None],
    eps: float,
    shape: Shape,
) -> Gradients:
    """Return the gradients that `normalize.py` asks for.

    Args:
        gradients: of y and of the statistics.
        saved: x, µ', v', gain, γ, statistics.
        sensitivity: h̄, and the sums that are added to; None to follow no inflation.
        eps: ε.
        shape: of `shape_of`.
    """
    dy, to_statistics = gradients
    x, prior_mean, prior_variance, gain, weight, statistics = saved
    assert x is not None and gain is not None
    if not is_array(dy, x.dtype) or dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)
    if to_statistics is not None:
        to_statistics = to_statistics.contiguous()
    dx, to_bias = torch.empty_like(x), gain.new_empty(shape[2])
    to_weight = None if weight is None else torch.empty_like(weight)
    prior: ToPrior = (None, None, None)
    if prior_mean is not None and prior_variance is not None:
        prior = (torch.empty_like(prior_mean), torch.empty_like(prior_mean), torch.empty_like(gain))
    slots = [*shape, *map(address, (dy, x, prior_mean, prior_variance)), _stride(prior_mean)]
    slots += map(address, (gain, weight, statistics, to_statistics, dx, to_weight, to_bias, *prior, *sensitivity))
    run("bkn_backward", [*slots, bits_of(eps), *[0] * 9])
    return dx, prior, to_weight, to_bias


def _stride(prior_mean: Tensor | None) -> int:
    return 0 if prior_mean is None or prior_mean.dim() == 1 else prior_mean.shape[-1]


@functools.cache
def bits_of(number: float) -> int:
    """Return a double as the 64-bit integer of the same bits."""
    return int(struct.unpack("q", struct.pack("d", number))[0])


def run(name: str, slots: list[int]) -> None:
    """Call a kernel with a structure of 64-bit integers, pointers and doubles."""
    kernels = library()
    assert kernels is not None
    arguments = array.array("q", slots)
    if getattr(kernels, name)(arguments.buffer_info()[0]):
        raise MemoryError("a normalization layer found no memory for its statistics")
