"""Everything the command line prints: human words on standard error, results on standard output."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from bkn_core.errors import BknError


class _Console(Console):
    """A console that tells of an output nobody reads any more, as of any other that cannot be written."""

    def on_broken_pipe(self) -> None:
        """Go on with the BrokenPipeError, in the place of an exit."""
        raise


class Reporter:
    """One command's voice.

    Args:
        verb: its name.
        as_json: print exactly one JSON object on standard output.
        verbose: show tracebacks of unexpected errors.
    """

    def __init__(self, verb: str, *, as_json: bool, verbose: bool = False) -> None:
        self.verb, self.as_json, self.verbose = verb, as_json, verbose
        # No markup, no emoji: paths and class names may hold brackets and colons.
        self.human = _Console(stderr=True, highlight=False, markup=False, emoji=False)
        self.output = _Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
        self.warnings: list[str] = []
        self.signal: int | None = None
        self.phase: Literal["loading", "free", "stepping"] = "loading"

    def say(self, text: str | Text) -> None:
        """Tell the user something while it happens, on one line however long: paths stay whole."""
        self.human.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Tell the user something to heed, once, and keep it for the JSON object."""
        if text in self.warnings:
            return
        self.warnings.append(text)
        self.say(Text.assemble(("note: ", "yellow"), text))

    def table(self, table: Table) -> None:
        """Print a table of results."""
        if not self.as_json:
            self.output.print(table)

    def text(self, text: str) -> None:
        """Print a line of results."""
        if not self.as_json:
            self.output.print(text, soft_wrap=True)

    def finish(self, result: dict[str, Any], artifacts: dict[str, str], failure: BknError | None = None) -> None:
        """Print the JSON object of a result; one that is not whole ends with the error of what is missing."""
        facts = self._facts(result, artifacts) if self.as_json else {}
        if failure is not None:
            self.fail(failure.code, failure.exit_code, failure.message, failure.hint, facts)
        if self.as_json:
            self._print_json({"schema": f"bkn.{self.verb}/1", "ok": True, **facts})

    def _facts(self, result: dict[str, Any], artifacts: dict[str, str]) -> dict[str, Any]:
        from bkn_core.engine.environment import versions
        from bkn_core.engine.files import finite

        facts = {"result": result, "artifacts": artifacts, "versions": versions(), "warnings": self.warnings}
        return finite(facts)  # type: ignore[no-any-return]

    def fail(self, code: str, exit_code: int, message: str, hint: str, facts: dict[str, Any] | None = None) -> NoReturn:
        """Print an error and end with its exit code; `facts` are what there is in spite of it."""
        with contextlib.suppress(OSError):  # it may be the output that failed
            self.say(Text.assemble(("error: ", "bold red"), message))
            for line in hint.splitlines():
                self.say(f"  {line}")
        if self.as_json:
            error = {"code": code, "exit": exit_code, "message": message, "hint": hint}
            with contextlib.suppress(OSError):
                self._print_json({"schema": f"bkn.{self.verb}/1", "ok": False, "error": error, **(facts or {})})
        self._empty_buffers()
        raise typer.Exit(exit_code)

    def _empty_buffers(self) -> None:
        """Give up what cannot be written, so that it does not fail once more when Python ends."""
        for file in (self.output.file, self.human.file):
            try:
                file.flush()
            except OSError:
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), file.fileno())

    def _print_json(self, document: dict[str, Any]) -> None:
        self.output.file.write(json.dumps(document, default=str) + "\n")
        self.output.file.flush()

    def should_stop(self) -> bool:
        """Whether Ctrl-C or SIGTERM has arrived."""
        return self.signal is not None

    def load_library(self) -> None:
        """Import the library, which takes seconds; one process of several stops only together with the others."""
        import bkn_core  # noqa: F401

        self.phase = "stepping" if "WORLD_SIZE" in os.environ else "free"


def metrics_table(metrics: dict[str, Any], *, group: int | None = None) -> Table:
    """Lay out measures by kind of statistics, some of them of groups of so many images."""
    whose = "an image by itself" if group == 1 else f"{group} images together"
    table = Table(caption=f"group: {whose}, as in training" if group else None, caption_justify="left")
    columns = list(dict.fromkeys(name for m in metrics.values() for name in m.shares))
    for name in ("statistics", *(f"{name} %" for name in columns), "loss", "images"):
        table.add_column(name, justify="left" if name == "statistics" else "right")
    for kind, measured in metrics.items():
        fractions = [f"{100 * measured.shares[k]:.2f}" if k in measured.shares else "" for k in columns]
        name = kind.replace("_mean_", " mean, ").replace("_", " ")
        table.add_row(name, *fractions, f"{measured.loss:z.4f}", str(measured.images))
    return table


def metrics_result(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return measures for JSON: flat for one kind of statistics, by kind for several."""
    if len(metrics) == 1:
        kind, measured = next(iter(metrics.items()))
        return {"stats": kind, **measured.summary()}
    first = next(iter(metrics.values()))
    figure = next(iter(first.summary()))
    return {figure: first.figure, "loss": first.loss, **{kind: m.summary() for kind, m in metrics.items()}}
