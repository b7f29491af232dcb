"""What a run ran on: versions, machine, command, commits and data, for its env.json."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bkn_core.ops import backend, kernels

_PACKAGES = ("bkn", "torch", "torchvision", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy")
_GIT_SECONDS = 5


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, device, threads, whether the CPU kernels and those in Triton serve, and what was called, where.

    The commits are those of the working folder and of this package's sources, null where they are not under git.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    sources = Path(__file__).parents[2]
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "cpu_kernels": kernels.library() is not None,
        "triton": backend.takes_triton(device.type),
        "command": command(),
        "folder": str(Path.cwd()),
        "commit": _commit(Path.cwd()),
        "bkn_commit": _commit(sources) if (sources / ".git").exists() else None,
    }


def command() -> str:
    """Return the command line of this process, as a shell takes it."""
    return shlex.join(sys.orig_argv).encode(errors="backslashreplace").decode()  # a word may be no text


def _commit(folder: Path) -> str | None:
    words = ["git", "-C", str(folder), "rev-parse", "--verify", "HEAD"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_GIT_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
