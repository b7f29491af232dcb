"""The first lines of the program: a signal waits until what answers it in words is imported."""

from __future__ import annotations

import signal

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def main() -> None:
    """Run the program; a verb heeds signals itself, this is the time before it begins and after it has ended."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    from bkn_cli.app import app

    try:
        app()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
