"""One finished run for all tests that only read it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import FULL, tiny

from bkn_core.engine.loop import train


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(tiny(*FULL), out=folder)
    return folder
