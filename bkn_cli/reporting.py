"""How a command ends: library errors, signals and faults of our own as words and exit codes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import typer

from bkn_cli.render import Reporter
from bkn_cli.start import ENDING

UNEXPECTED = 1
FOLLOWS = "BKN_FOLLOWS"  # set for processes that another one of this program has started
_STOPPED = "No file is left half-written."
_AFTERWARDS = 2.0  # seconds


@contextlib.contextmanager
def reporting(verb: str, *, as_json: bool, verbose: bool = False) -> Iterator[Reporter]:
    """Run one command: library errors become words and exit codes, signals a request to stop."""
    reporter = Reporter(verb, as_json=as_json, verbose=verbose)
    with warnings.catch_warnings(), _quiet_output(as_json):
        if not verbose:
            warnings.simplefilter("ignore")
        try:
            with _signals(reporter), _notes(reporter):
                yield reporter
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            reporter.fail("interrupted", exit_code(reporter.signal), "stopped at once", _STOPPED)
        except Exception as error:
            _explain(reporter, error)


def exit_code(number: int | None) -> int:
    """Return the exit code after a signal, by default after Ctrl-C: 130."""
    return 128 + (number or signal.SIGINT)


def _quiet_output(as_json: bool) -> contextlib.AbstractContextManager[object]:
    """Send what libraries print to standard error where standard output is for one JSON object."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


class _Notes(logging.Handler):
    """What the library logs for the user to heed, in the command's voice."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.WARNING)
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self.reporter.warn(record.getMessage())


@contextlib.contextmanager
def _notes(reporter: Reporter) -> Iterator[None]:
    logger, notes = logging.getLogger("bkn"), _Notes(reporter)
    logger.addHandler(notes)
    try:
        yield
    finally:
        logger.removeHandler(notes)


def _explain(reporter: Reporter, error: Exception) -> NoReturn:
    from bkn_core.errors import BknError, DeviceError, InterruptedRun, OutputError

    if isinstance(error, InterruptedRun):
        reporter.fail(error.code, exit_code(reporter.signal), error.message, error.hint)
    if isinstance(error, BknError):
        reporter.fail(error.code, error.exit_code, error.message, error.hint)
    if reporter.should_stop():  # some libraries make another error of an interruption
        _explain_stop(reporter)
    if _is_memory(error):
        hint = "Lower batch.per_device, eval.batch_size or data.image_size, or take a smaller model."
        reporter.fail("memory", DeviceError.exit_code, f"out of memory: {(str(error).splitlines() or [''])[0]}", hint)
    if isinstance(error, OSError):  # of the files that the library writes it makes errors of its own
        reporter.fail("output", OutputError.exit_code, f"the output cannot be written: {error}", "")
    if reporter.verbose:
        traceback.print_exception(error)
    if FOLLOWS in os.environ:  # perhaps another process has ended: who started both will say so, and end this one
        time.sleep(_AFTERWARDS)
    what = f"{type(error).__name__}: {error}"
    reporter.fail("unexpected", UNEXPECTED, what, "This is a fault of bkn; --verbose shows the traceback.")


def _is_memory(error: Exception) -> bool:
    # PyTorch's allocator for the CPU has no class for it.
    words = ("allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _explain_stop(reporter: Reporter) -> NoReturn:
    reporter.fail("interrupted", exit_code(reporter.signal), "stopped at once", _STOPPED)


@contextlib.contextmanager
def _signals(reporter: Reporter) -> Iterator[None]:
    """Let a signal end the command: between steps after a save, else at once, as a second SIGINT does.

    One that came while the program was starting is heard now; a hang-up that is ignored (`nohup`) stays so.
    """

    def ask(number: int, _: FrameType | None) -> None:
        again = reporter.signal is not None
        reporter.signal = reporter.signal or number
        if reporter.phase == "loading":
            # An exception in the middle of an import is lost in some libraries; nothing is to be cleaned up yet.
            with contextlib.suppress(typer.Exit):
                _explain_stop(reporter)
            os._exit(exit_code(number))
        if reporter.phase == "free" or (again and number == signal.SIGINT):
            raise KeyboardInterrupt

    heard = [n for n in ENDING if n in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in heard}
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
