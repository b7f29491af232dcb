"""One tiny trained run for all tests of the command line, and the program called in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calls import TINY, call
from typer.testing import Result


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The folder of a finished run, and what the program said."""
    folder = tmp_path_factory.mktemp("trained") / "run é [x]"
    return folder, call("train", *TINY, "--out", str(folder), "--json")


@pytest.fixture
def run(trained: tuple[Path, Result]) -> Path:
    """A finished run, to be read only."""
    return trained[0]


@pytest.fixture
def answer(trained: tuple[Path, Result]) -> dict[str, Any]:
    """The JSON object of the training."""
    document: dict[str, Any] = json.loads(trained[1].stdout)
    return document


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refuse(inside: Path) -> Callable[..., dict[str, Any]]:
    """Call the program with --json, check that it refuses with an exit code, and return the error."""

    def refused(exit_code: int, *words: str) -> dict[str, Any]:
        result = call(*words, "--json")
        document = json.loads(result.stdout)
        error: dict[str, Any] = document["error"]
        assert (result.exit_code, document["ok"], error["exit"]) == (exit_code, False, exit_code)
        assert error["message"] in result.stderr
        assert "Traceback" not in result.stderr
        return error

    return refused
