"""Recipes without the rest of the library, whose PyTorch takes seconds: for help, completion and lists of keys."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib import util


@contextlib.contextmanager
def recipes_alone() -> Iterator[None]:
    """Let the modules of recipes be imported without the package around them, where that is not there yet."""
    spec = util.find_spec("bkn_core") if "bkn_core" not in sys.modules else None
    if spec is None:
        yield
        return
    sys.modules["bkn_core"] = util.module_from_spec(spec)  # its own lines do not run
    try:
        yield
    finally:
        del sys.modules["bkn_core"]
