"""ONNX Runtime sessions on the provider that was asked for, or an error that says why not."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
import torch  # before onnxruntime, which then finds the CUDA libraries that torch has loaded
from numpy.typing import NDArray

from bkn_core.errors import DeviceError, InputError
from bkn_core.export.graph import INPUT, OUTPUT

OPTIMIZATION_LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL")
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_SILENT = 4  # what is worse than a warning arrives as an exception
_REINSTALL = 'pip install --force-reinstall "torch>=2.11" "onnxruntime-gpu>=1.27"'


class OpenedSession(NamedTuple):
    """A session, the provider that runs it, and why "auto" left a GPU idle that PyTorch finds."""

    session: Any
    provider: str
    fell_back: str | None = None


def create_session(
    graph: bytes, device: str = "cpu", *, level: str = "ORT_ENABLE_ALL", exact: bool = False
) -> OpenedSession:
    """Open a graph in ONNX Runtime. Not run on a GPU.

    Args:
        graph: bytes of an ONNX file.
        device: "cpu", "cuda", "cuda:N", or "auto" for CUDA where it works.
        level: name of ONNX Runtime's optimization level.
        exact: without TF32, for comparisons.

    Raises:
        DeviceError: CUDA was asked for and the session is not on it.
        InputError: ONNX Runtime refuses the graph.
    """
    if device == "auto":
        try:
            return create_session(graph, "cuda", level=level, exact=exact)
        except DeviceError as error:
            why = f"{error.message}; it runs on the CPU" if torch.cuda.is_available() else None
            return create_session(graph, "cpu", level=level)._replace(fell_back=why)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = _SILENT
    wanted, settings = _provider(device)
    if wanted == CUDA:
        _check_cuda(device)
        settings |= {"use_tf32": "0"} if exact else {}
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=[(wanted, settings)], enable_fallback=False)
    except _runtime_errors() as error:
        if wanted == CUDA:
            raise _cuda_error(device, _first_line(error)) from error
        raise InputError(f"ONNX Runtime refuses the graph: {_first_line(error)}", "Export the file again.") from error
    provider = session.get_providers()[0]
    if provider != wanted:
        raise _cuda_error(device, f"its session is on {provider}")
    return OpenedSession(session, provider)


def run_session(session: Any, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the logits of normalized images.

    Raises:
        InputError: ONNX Runtime cannot run the graph on them.
    """
    try:
        logits: NDArray[np.float32] = session.run([OUTPUT], {INPUT: np.ascontiguousarray(images)})[0]
    except _runtime_errors() as error:
        raise InputError(
            f"ONNX Runtime cannot run the graph: {_first_line(error)}", "Export the file again."
        ) from error
    return logits


def _provider(device: str) -> tuple[str, dict[str, str]]:
    if device == "cpu":
        return CPU, {}
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise DeviceError(f"device is {device!r} for ONNX Runtime", "Choose auto, cpu, cuda or cuda:N.")
    return CUDA, {"device_id": match[1] or "0"}


def _check_cuda(device: str) -> None:
    """Refuse what cannot work before ONNX Runtime tries it and complains on the terminal."""
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        raise _cuda_error(device, "it is built without CUDA")
    if torch.version.cuda is not None and not torch.cuda.is_available():
        raise _cuda_error(device, "PyTorch finds no CUDA device")
    count = torch.cuda.device_count()
    if count and int(device.partition(":")[2] or 0) >= count:
        raise DeviceError(f"device is {device!r}, but the number of CUDA devices is {count}", "Count from cuda:0.")


def _cuda_error(device: str, cause: str) -> DeviceError:
    """Say what was asked, what is there, and the one command that mends it."""
    from onnxruntime.capi import build_and_package_info as build

    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    runtime = getattr(build, "cuda_version", "")
    versions = (
        f"PyTorch {torch.__version__} is built for CUDA {torch.version.cuda or 'none'}, "
        f"{' and '.join(installed) or 'ONNX Runtime'} {build.__version__} for CUDA {runtime or 'none'}."
    )
    if len(installed) == 2:
        cause += "; onnxruntime and onnxruntime-gpu are both installed and hide each other"
        advice = "Keep one of them: pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
    elif str(torch.version.cuda).split(".")[0] != str(runtime).split(".")[0]:
        advice = f"The CUDA majors must agree: {_REINSTALL}"
    else:
        advice = "Check the driver with nvidia-smi, or use --device cpu."
    return DeviceError(f"ONNX Runtime does not run on {device!r}: {cause}", f"{versions} {advice}")


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _runtime_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of ONNX Runtime, which have no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = [value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*found, RuntimeError, ValueError)


def _first_line(error: Exception) -> str:
    """What ONNX Runtime says, without the paths and signatures of its source."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"/\S+\.(h|cc|cpp):\d+ (.*was false\. |.*\) )?", "", line)[:300]
