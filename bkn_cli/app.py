"""The `bkn` program."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from typing import Annotated

import typer

from bkn_cli.compare import compare
from bkn_cli.eval import evaluate
from bkn_cli.export import export
from bkn_cli.train import train

USAGE = 2
app = typer.Typer(
    name="bkn",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train networks on one or two images per statistics group: Batch Kalman Normalization.\n\n"
    "Exit codes: 0 success, 1 unexpected, 2 usage or recipe, 3 input missing or unreadable, 4 a check failed, "
    "5 device not available, 6 diverged, 130 Ctrl-C, 143 SIGTERM.",
)
app.command()(train)
app.command("eval")(evaluate)
app.command()(compare)
app.command()(export)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bkn {metadata.version('bkn')}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the program; a usage error under --json is a JSON object too."""
    try:
        app()
    except SystemExit as end:
        if end.code == USAGE and "--json" in sys.argv and not _has_spoken():
            error = {"code": "usage", "exit": USAGE, "message": "wrong usage", "hint": "See standard error."}
            sys.stdout.write(json.dumps({"ok": False, "error": error}) + "\n")
        raise


def _has_spoken() -> bool:
    """Whether a verb has printed its own JSON object."""
    from bkn_cli.render import Reporter

    return Reporter.has_spoken


if __name__ == "__main__":
    main()
