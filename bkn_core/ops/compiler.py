"""Compile the package's C and C++ with the compilers of the machine, once, into the user's cache folder."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bkn_core.ops import library_cache

_LOG = logging.getLogger("bkn")
_PATIENCE = 10.0  # seconds of waiting after which the user is told why


class Source(NamedTuple):
    """What is compiled, and how.

    Args:
        name: what the library's name begins with.
        variable: of the environment, that names the compiler.
        compilers: of which the first that is installed is taken where the variable is not set.
        files: to compile.
        headers: that they include.
        flags: before the files.
        links: behind them.
    """

    name: str
    variable: str
    compilers: tuple[str, ...]
    files: Sequence[Path]
    headers: Sequence[Path] = ()
    flags: Sequence[str] = ()
    links: Sequence[str] = ()

    def compiler(self) -> list[str]:
        """Return the command of the compiler, empty where none is installed.

        Raises:
            ValueError: the variable is no command.
        """
        given = os.environ.get(self.variable, "")
        try:
            named = shlex.split(given)
        except ValueError as error:
            raise ValueError(f"{self.variable} is {given!r}: {str(error).lower()}; give a command") from error
        return named or list(filter(shutil.which, self.compilers))[:1]

    def library(self, compiler: Sequence[str]) -> Path:
        """Return where the library of these sources, flags and compiler is kept.

        Raises:
            OSError: there is no folder for it.
        """
        text = b"".join(file.read_bytes() for file in sorted((*self.files, *self.headers)))
        made_for = (*compiler, *self.flags, *self.links, platform.machine(), *platform.libc_ver())
        digest = hashlib.sha256(text + repr(made_for).encode()).hexdigest()[:16]
        return library_cache.private_folder() / f"{self.name}-{digest}.so"


class Building:
    """A library that is compiled while the program goes on, and after its end; by one of several processes.

    Args:
        source: of what.
        limit: seconds that the compiler may take.
        niceness: of the compiler.
    """

    def __init__(self, source: Source, limit: float, niceness: int = 0) -> None:
        self.name, self.limit, self.is_made, self.is_over = source.name, limit, False, False
        self.process: subprocess.Popen[bytes] | None = None
        try:
            compiler = source.compiler()
            if not compiler:
                _LOG.info("%s kernels are not compiled: no %s", source.name, " or ".join(source.compilers))
                self.is_over = True
                return
            self.library = source.library(compiler)
            self.is_made = library_cache.is_whole(self.library)
            if self.is_made:
                library_cache.touch(self.library)
            elif not self._has_failed():
                command = [*compiler, *source.flags, *map(str, source.files), *source.links]
                self.process = self._begin([str(self.library), str(limit), str(niceness), *command])
        except (OSError, ValueError) as error:
            self._give_up(str(error))

    @staticmethod
    def _begin(arguments: list[str]) -> subprocess.Popen[bytes]:
        quiet = subprocess.DEVNULL
        return subprocess.Popen(
            [sys.executable, "-I", library_cache.__file__, *arguments],
            stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True,
        )  # fmt: skip

    def path(self) -> Path | None:
        """Return the library, None as long as it is not there."""
        if not self.is_made and not self.is_over and self.process is not None and self.process.poll() is not None:
            self.is_made = library_cache.is_whole(self.library)
            if not self.is_made and not self._has_failed():
                self._give_up("its compilation was ended")
        return self.library if self.is_made else None

    def wait(self, seconds: float | None = None) -> Path | None:
        """Return the library when it is there, None if it does not come, by default within twice the limit."""
        begin, is_told = time.monotonic(), False
        while self.path() is None and not self.is_over:
            waited = time.monotonic() - begin
            if seconds is None and waited > 2 * self.limit:
                self._give_up("another process has not ended compiling them")
            elif seconds is not None and waited > seconds:
                break
            if waited > _PATIENCE and seconds is None and not is_told:
                is_told = True
                _LOG.warning("waiting for the compiler of the CPU kernels (once); BKN_NATIVE=0 goes without them")
            time.sleep(0.05)
        return self.path()

    def _has_failed(self) -> bool:
        reason = library_cache.failure(self.library)
        if reason is not None:
            again = f"it is tried again an hour later, or without {self.library.with_suffix('.failed')}"
            self._give_up(f"{reason} ({again})")
        return reason is not None

    def _give_up(self, reason: str) -> None:
        self.is_over = True
        _LOG.warning("%s kernels are not compiled, PyTorch does the work more slowly: %s", self.name, reason)
