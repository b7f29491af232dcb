"""Nothing is told to anybody: no look-up, no connection (below Python too), no file but those that were asked for
and Matplotlib's list of fonts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from calls import TINY

WAIT = 10  # seconds after which ONNX Runtime would have called home
PROGRAM = """
import sys, time
from bkn_cli.app import app
train = ["train", *sys.argv[2:], "--out", "run"]
for words in (train, ["export", "model.onnx", "--run", "run"], ["eval", "model.onnx"]):
    try:
        app(words)
    except SystemExit as end:
        assert not end.code
time.sleep(int(sys.argv[1]))
"""


@pytest.fixture
def listened(tmp_path: Path) -> dict[str, str]:
    """An environment in which every look-up is refused and written to the file LOOK_UPS."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler, or not Linux")
    library = tmp_path / "silence.so"
    source = Path(__file__).with_name("silence.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    home = tmp_path / "home"
    home.mkdir()
    told = {"LD_PRELOAD": str(library), "LOOK_UPS": str(tmp_path / "look_ups"), "HOME": str(home)}
    unset = {"XDG_CACHE_HOME", "XDG_CONFIG_HOME", "ORT_DISABLE_TELEMETRY"}
    return {k: v for k, v in os.environ.items() if k not in unset} | told | {"BKN_NATIVE": "0"}


def test_a_look_up_is_seen(listened: dict[str, str]) -> None:
    look = "import socket\ntry: socket.getaddrinfo('example.org', 80)\nexcept OSError: pass"
    subprocess.run([sys.executable, "-c", look], env=listened, check=True, timeout=60)
    assert Path(listened["LOOK_UPS"]).read_text() == "example.org\n"


@pytest.mark.slow
def test_training_export_and_evaluation_tell_nobody(listened: dict[str, str], inside: Path) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM, str(WAIT), *TINY], env=listened, check=True, timeout=300)
    assert not Path(listened["LOOK_UPS"]).exists()
    written = [file for file in Path(listened["HOME"]).rglob("*") if file.is_file()]
    assert {(file.parent.name, file.name.partition("-")[0]) for file in written} <= {("matplotlib", "fontlist")}
