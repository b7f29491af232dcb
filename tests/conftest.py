"""Every test starts from the same random state; drawn cases are the same in every run.

One thread: on the small tensors of these tests a second one costs more than it gives, most of all on a busy machine.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, whose own functions are made then

import bkn_core.export  # noqa: F401 (before a test imports ONNX Runtime, whose telemetry it switches off)
from bkn_core.ops import extension, kernels

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_random_state() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def in_cpp() -> bool:
    """Whether there is a C++ compiler, whose work has been waited for."""
    extension.building().wait(240)  # seconds that two busy cores may take
    return extension.operations() is not None


@pytest.fixture(scope="module", params=["extension", "kernels", "pytorch"])
def every_path(request: pytest.FixtureRequest, in_cpp: bool) -> Iterator[None]:
    """Run a module's tests through the node in C++, again through the CPU kernels alone, and without both."""
    library, node = kernels.library(), None
    if request.param != "pytorch" and library is None:
        pytest.skip("no C compiler")
    if request.param == "extension":
        if not in_cpp:
            pytest.skip("no C++ compiler")
        node = extension.operations()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "library", lambda: None if request.param == "pytorch" else library)
        patch.setattr(extension, "operations", lambda: node)
        yield


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(str(Path(folder) / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes recipes."""

    def _write(text: str | bytes, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return _write
