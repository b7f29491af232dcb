"""Choosing where a model runs, and in what precision."""

from __future__ import annotations

import contextlib

import torch

from bkn_core.errors import DeviceError, RecipeError


def choose_device(name: str) -> torch.device:
    """Return the device that a name asks for; "auto" prefers CUDA, then MPS.

    Not run on a GPU.

    Raises:
        RecipeError: there is no such kind of device.
        DeviceError: the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device is {name!r}", "Choose auto, cpu, cuda, cuda:N or mps.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"device is {name!r}, but this PyTorch ({torch.__version__}) finds no CUDA device",
            "Use --device cpu or --device auto, or install a driver that serves "
            f"CUDA {torch.version.cuda or '(this PyTorch is a build without CUDA)'}.",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device is {name!r}, but there are {torch.cuda.device_count()} CUDA devices", "Count from cuda:0."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device is 'mps', but this machine has no Metal device", "Use --device cpu or auto.")
    if device.type not in ("cpu", "cuda", "mps"):
        raise RecipeError(f"device is {name!r}", "Choose auto, cpu, cuda, cuda:N or mps.")
    return device


def mixed_precision(amp: bool | str, device: torch.device) -> torch.dtype | None:
    """Return the type of activations, or None for float32: bfloat16 where the device has it, else float16.

    "auto" is on for CUDA only. Statistics stay in float32 (see `norm.layers`). Not run on a GPU.
    """
    wanted = device.type == "cuda" if amp == "auto" else bool(amp)
    if not wanted:
        return None
    return torch.float16 if device.type == "cuda" and not torch.cuda.is_bf16_supported() else torch.bfloat16


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[None]:
    """Return the context of a forward pass."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def synchronize(device: torch.device) -> None:
    """Wait until everything queued on a GPU is done, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
