"""What tests of the normalization share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bkn_core.norm import native


@pytest.fixture(scope="module", params=["kernels", "pytorch"])
def both_paths(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a module's tests through the CPU kernels, and again without them."""
    library = native.library()
    if request.param == "kernels" and library is None:
        pytest.skip("no C compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: library if request.param == "kernels" else None)
        yield
