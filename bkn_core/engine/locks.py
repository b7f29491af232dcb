"""One process at a time in a folder, by a lock that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from bkn_core.errors import BusyError, OutputError

NAME = ".lock"


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Keep all others out of a folder, which is made where it is not there; its lock file stays and means nothing.

    Args:
        folder: the folder.

    Returns:
        A context that yields whether others are kept out: some file systems have no locks.

    Raises:
        BusyError: another process, or another thread of this one, is in there.
        OutputError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutputError(
            f"the folder {folder} cannot be used: {error}", "Choose another folder with --out."
        ) from error
    try:
        is_alone = _take(handle, folder)
        with contextlib.suppress(OSError):  # only words for others to read
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
        yield is_alone
    finally:
        os.close(handle)


def is_held(folder: Path) -> bool:
    """Say whether a process is in a folder; yes where that cannot be told, as on a file system without locks."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return True
    finally:
        os.close(handle)
    return False


def _take(handle: int, folder: Path) -> bool:
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = os.read(handle, 200).decode(errors="replace") or "another process"
        raise BusyError(
            f"{folder} is in use by {holder}", "Let it end or stop it, or use another folder with --out."
        ) from error
    except (ImportError, OSError):  # Windows, and file systems without locks
        return False
    return True
