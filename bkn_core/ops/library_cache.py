"""The cache folder of compiled libraries, and the process that compiles one into it (this file as a program).

Only what this user's compiler wrote is ever loaded, and only whole: the folder is the user's alone, and beside each
library lies its digest. Standard library only, so that the process starts at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

REMEMBERED = 3600.0  # seconds for which a failure is believed
_KEPT = 30 * 86400.0  # seconds after its last use at which a file goes


def private_folder() -> Path:
    """Return the cache folder, which is made if need be and closed to everybody else.

    Raises:
        OSError: there can be none, or it is somebody else's.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = (named if named.is_absolute() else Path.home() / ".cache") / "bkn"
    except RuntimeError as error:
        raise FileNotFoundError("this user has no home folder for compiled kernels; set XDG_CACHE_HOME") from error
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(
            f"{folder} is not a folder of user {os.geteuid()}, so what lies there is not run; set XDG_CACHE_HOME"
        )
    if status.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def is_whole(library: Path) -> bool:
    """Whether a library is there as this user's compiler wrote it."""
    try:
        return hashlib.sha256(_own(library)).hexdigest() == _own(_digest(library)).decode()
    except (OSError, UnicodeDecodeError):
        return False


def touch(library: Path) -> None:
    """Keep a library that is used from being swept."""
    for file in (library, _digest(library)):
        with contextlib.suppress(OSError):
            os.utime(file)


def failure(library: Path) -> str | None:
    """Return why a library could not be compiled a short while ago, None where that is not known."""
    note = library.with_suffix(".failed")
    try:
        return None if time.time() - note.stat().st_mtime > REMEMBERED else _own(note).decode(errors="replace")
    except OSError:
        return None


def build(library: Path, limit: float, command: Sequence[str]) -> None:
    """Compile a library, unless another process has meanwhile or has failed to.

    Args:
        library: where it is to be.
        limit: seconds after which the compiler and its children are killed.
        command: of the compiler, without its output.
    """
    with _alone(library.with_suffix(".making")) as aside:
        if is_whole(library) or failure(library) is not None:
            return
        _sweep(library.parent)
        note, made = library.with_suffix(".failed"), aside / library.name
        try:
            reason = _compile([*command, "-o", str(made)], limit, aside)
            if not reason:
                _keep(_digest(library), hashlib.sha256(made.read_bytes()).hexdigest().encode(), aside)
                _keep(library, made.read_bytes(), aside)
                note.unlink(missing_ok=True)
        except OSError as error:
            reason = str(error)
        if reason:
            note.write_text(reason)


def _digest(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _own(file: Path) -> bytes:
    """Read a plain file that nobody but this user can have written."""
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{file} may be somebody else's")
    return file.read_bytes()


def _keep(file: Path, content: bytes, aside: Path) -> None:
    """Write a file whole or not at all, whatever ends the machine."""
    whole = aside / "whole"
    with whole.open("wb") as written:
        written.write(content)
        written.flush()
        os.fsync(written.fileno())
    whole.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


@contextlib.contextmanager
def _alone(aside: Path) -> Iterator[Path]:
    """An empty folder that one process at a time has; what a killed one left in it goes first."""
    import fcntl

    while True:
        aside.mkdir(exist_ok=True)
        lock = os.open(aside, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(lock), aside.stat()):
                break
        os.close(lock)  # its former owner has removed it
    try:
        shutil.rmtree(aside / "temporary", ignore_errors=True)
        for file in aside.iterdir():
            file.unlink()
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(lock)


def _compile(command: Sequence[str], limit: float, aside: Path) -> str:
    """Run the compiler and return why it failed, nothing where it did not; none of its children stays behind."""
    words, temporary = aside / "words", aside / "temporary"
    temporary.mkdir()
    with words.open("wb") as said:
        compiler = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
            env={**os.environ, "TMPDIR": str(temporary)},
        )  # fmt: skip
        try:
            code: int | None = compiler.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(compiler.pid, signal.SIGKILL)
        compiler.wait()
    if code is None:
        return f"{command[0]} did not end within {limit:g} seconds"
    if not code and Path(command[-1]).is_file():
        return ""
    lines = [line for line in words.read_text(errors="replace").splitlines() if line.strip()]
    error = next((line for line in lines if "error" in line), lines[-1] if lines else "it wrote no library")
    return f"{command[0]} ended with {code}: {error.strip()[:300]}"


def _sweep(folder: Path) -> None:
    """Remove what has not been used for long: libraries of former versions, and whatever else was left."""
    for file in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - file.lstat().st_mtime > _KEPT:
                shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()


if __name__ == "__main__":
    os.umask(0o077)
    os.nice(int(sys.argv[3]))
    build(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[4:])
