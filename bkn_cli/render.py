"""Everything the command line prints: human words on standard error, results on standard output, errors in one form."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

UNEXPECTED = 1


class Reporter:
    """One command's voice.

    Args:
        verb: its name.
        as_json: print exactly one JSON object on standard output.
        verbose: show tracebacks of unexpected errors.
    """

    has_spoken = False  # whether this process has printed its JSON object

    def __init__(self, verb: str, *, as_json: bool, verbose: bool = False) -> None:
        self.verb, self.as_json, self.verbose = verb, as_json, verbose
        self.human = Console(stderr=True, highlight=False)
        self.output = Console(highlight=False)
        self.warnings: list[str] = []
        self.signal: int | None = None

    def say(self, text: str) -> None:
        """Tell the user something while it happens."""
        self.human.print(text)

    def warn(self, text: str) -> None:
        """Tell the user something to heed, and keep it for the JSON object."""
        self.warnings.append(text)
        self.human.print(f"[yellow]note:[/yellow] {escape(text)}")

    def table(self, table: Table) -> None:
        """Print a result."""
        if not self.as_json:
            self.output.print(table)

    def text(self, text: str) -> None:
        """Print a line of the result."""
        if not self.as_json:
            self.output.print(text, soft_wrap=True)

    def finish(self, result: dict[str, Any], artifacts: dict[str, str]) -> None:
        """Print the JSON object of a success."""
        if not self.as_json:
            return
        from bkn_core.engine.files import finite
        from bkn_core.engine.run_folder import versions

        document = {
            "schema": f"bkn.{self.verb}/1",
            "ok": True,
            "result": result,
            "artifacts": artifacts,
            "versions": versions(),
            "warnings": self.warnings,
        }
        self._print_json(finite(document))

    def _print_json(self, document: dict[str, Any]) -> None:
        Reporter.has_spoken = True
        sys.stdout.write(json.dumps(document, default=str) + "\n")

    def fail(self, code: str, exit_code: int, message: str, hint: str) -> NoReturn:
        """Print an error and end with its exit code."""
        if self.as_json:
            error = {"code": code, "exit": exit_code, "message": message, "hint": hint}
            self._print_json({"schema": f"bkn.{self.verb}/1", "ok": False, "error": error})
        self.human.print(f"[bold red]error:[/bold red] {escape(message)}", soft_wrap=True)
        if hint:
            self.human.print(f"  {escape(hint)}", soft_wrap=True)
        raise typer.Exit(exit_code)

    def should_stop(self) -> bool:
        """Whether Ctrl-C or SIGTERM has arrived."""
        return self.signal is not None


@contextlib.contextmanager
def reporting(verb: str, *, as_json: bool, verbose: bool = False) -> Iterator[Reporter]:
    """Run one command: library errors become words and exit codes, signals a request to stop, warnings notes."""
    reporter = Reporter(verb, as_json=as_json, verbose=verbose)
    with warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")
        try:
            with _signals(reporter):
                yield reporter
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            reporter.fail("interrupted", 130, "stopped at once by a second Ctrl-C", "The last checkpoint is sound.")
        except Exception as error:
            _explain(reporter, error)


def _explain(reporter: Reporter, error: Exception) -> NoReturn:
    from bkn_core.errors import BknError, InterruptedRun

    if isinstance(error, InterruptedRun):
        code = 143 if reporter.signal == signal.SIGTERM else error.exit_code
        reporter.fail(error.code, code, error.message, error.hint)
    if isinstance(error, BknError):
        reporter.fail(error.code, error.exit_code, error.message, error.hint)
    if reporter.verbose:
        traceback.print_exception(error)
    kind = type(error).__name__
    reporter.fail(
        "unexpected", UNEXPECTED, f"{kind}: {error}", "This is a fault of bkn; --verbose shows the traceback."
    )


@contextlib.contextmanager
def _signals(reporter: Reporter) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a request that is heeded after the step; a second SIGINT ends at once."""

    def ask(number: int, _: FrameType | None) -> None:
        if reporter.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        reporter.signal = number
        reporter.human.print("[yellow]stopping after this step ...[/yellow]")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def metrics_table(title: str, metrics: dict[str, Any]) -> Table:
    """Lay out measures by kind of statistics."""
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(k for m in metrics.values() for k in m.topk))
    for name in ("statistics", "top-1 %", *(f"top-{k} %" for k in columns), "loss", "images"):
        table.add_column(name, justify="left" if name == "statistics" else "right")
    for kind, measured in metrics.items():
        fractions = [f"{100 * measured.topk[k]:.2f}" if k in measured.topk else "" for k in columns]
        table.add_row(kind, f"{100 * measured.top1:.2f}", *fractions, f"{measured.loss:.4f}", str(measured.images))
    return table


def metrics_result(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return measures for JSON: flat for one kind of statistics, by kind for both."""
    if len(metrics) == 1:
        kind, measured = next(iter(metrics.items()))
        return {"stats": kind, **measured.summary()}
    first = next(iter(metrics.values()))
    return {"top1": first.top1, "loss": first.loss, **{kind: m.summary() for kind, m in metrics.items()}}
