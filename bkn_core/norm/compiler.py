"""Compile the package's C and C++ with the compilers of the machine, once, into the user's cache directory."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

_LOG = logging.getLogger("bkn")
_ABANDONED = 600  # seconds after which nobody can still be compiling
_SCRIPT = (
    'library=$1 made=$2 marker=$3; shift 3; nice "$@" -o "$made" && mv "$made" "$library"; rm -f "$made" "$marker"'
)


def compiler(variable: str, *names: str) -> list[str]:
    """Return the command that an environment variable names, else the first of the names that is installed."""
    return shlex.split(os.environ.get(variable, "")) or [next(filter(shutil.which, names), names[-1])]


def place(name: str, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """Return where the library of these sources and flags is kept."""
    text = b"".join(file.read_bytes() for file in sorted(sources))
    digest = hashlib.sha256(text + repr((*flags, platform.machine())).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bkn"
    return folder / f"{name}-{digest}.so"


def compile_now(library: Path, command: Sequence[str], libraries: Sequence[str] = ()) -> Path:
    """Compile a library if it is not there yet, and return it.

    Raises:
        OSError, subprocess.SubprocessError: where that fails.
    """
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as aside:  # several processes may compile at once
            made = Path(aside) / library.name
            command = [*command, "-o", str(made), *libraries]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            made.replace(library)
    return library


class Building:
    """A library that is compiled while the program goes on, and after its end; by one of several processes.

    Args:
        library: where it is to be.
        command: of the compiler, without its output.
    """

    def __init__(self, library: Path, command: Sequence[str]) -> None:
        self.library, self.is_made, self.is_over = library, library.exists(), False
        self.process: subprocess.Popen[bytes] | None = None
        marker = library.with_suffix(".building")
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            if not self.is_made and _claim(marker):
                arguments = [str(library), f"{library}.{os.getpid()}", str(marker), *command]
                quiet = subprocess.DEVNULL
                self.process = subprocess.Popen(
                    ["sh", "-c", _SCRIPT, "sh", *arguments],
                    stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            _LOG.info("%s is not compiled: %s", library.name, error)
            self.is_over = True
            with contextlib.suppress(OSError):
                marker.unlink(missing_ok=True)

    def path(self) -> Path | None:
        """Return the library, None as long as it is not there."""
        if self.is_made or self.is_over:
            return self.library if self.is_made else None
        is_over = self.process is not None and self.process.poll() is not None
        self.is_made = self.library.exists()
        if is_over and not self.is_made:
            _LOG.info("%s could not be compiled", self.library.name)
            self.is_over = True
        return self.library if self.is_made else None

    def wait(self, seconds: float) -> Path | None:
        """Return the library when it is there, None if it does not come in time."""
        end = time.monotonic() + seconds
        while self.path() is None and not self.is_over and time.monotonic() < end:
            time.sleep(0.1)
        return self.path()


def _claim(marker: Path) -> bool:
    """Whether it is this process that has to compile."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        if time.time() - marker.stat().st_mtime < _ABANDONED:
            return False
        marker.touch()
    return True
