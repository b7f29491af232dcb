"""What tests of the normalization share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bkn_core.norm import compiled_node, native


@pytest.fixture(scope="module", params=["node", "kernels", "pytorch"])
def every_path(request: pytest.FixtureRequest, in_cpp: bool) -> Iterator[None]:
    """Run a module's tests through the node in C++, again through the CPU kernels alone, and without both."""
    library, node = native.library(), None
    if request.param != "pytorch" and library is None:
        pytest.skip("no C compiler")
    if request.param == "node":
        if not in_cpp:
            pytest.skip("no C++ compiler")
        node = compiled_node.node()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None if request.param == "pytorch" else library)
        patch.setattr(compiled_node, "node", lambda: node)
        yield
