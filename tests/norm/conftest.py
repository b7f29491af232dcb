"""What tests of the normalization share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bkn_core.norm import compiled_node, native

COMPILATION = 240  # seconds that two busy cores may take for the node


@pytest.fixture(scope="session")
def in_cpp() -> bool:
    """Whether there is a C++ compiler, whose work has been waited for."""
    compiled_node.building().wait(COMPILATION)
    return compiled_node.node() is not None


@pytest.fixture(scope="module", params=["node", "kernels", "pytorch"])
def every_path(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a module's tests through the node in C++, again through the CPU kernels alone, and without both."""
    library, node = native.library(), None
    if request.param != "pytorch" and library is None:
        pytest.skip("no C compiler")
    if request.param == "node":
        compiled_node.building().wait(COMPILATION)
        node = compiled_node.node()
        if node is None:
            pytest.skip("no C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None if request.param == "pytorch" else library)
        patch.setattr(compiled_node, "node", lambda: node)
        yield
