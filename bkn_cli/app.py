"""The `bkn` program."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from bkn_cli.compare import compare
from bkn_cli.eval import evaluate
from bkn_cli.export import export
from bkn_cli.keys import keys
from bkn_cli.options import NO_VALUE
from bkn_cli.predict import predict
from bkn_cli.render import Reporter
from bkn_cli.train import train
from bkn_cli.verb import RecipeVerb


class Program(TyperGroup):
    """The group of verbs; under --json a usage error is a JSON object too."""

    def main(self, args: Sequence[str] | None = None, *positional: Any, **options: Any) -> Any:
        """Run the words of a command line, those of this process by default."""
        words = sys.argv[1:] if args is None else list(args)
        if "--json" not in words:
            return super().main(words, *positional, **options)
        try:
            code = super().main(words, *positional, **{**options, "standalone_mode": False})
        except TyperException as error:
            code = self._explain(words, error.format_message())
        sys.exit(code)

    def _explain(self, words: list[str], message: str) -> int:
        verb = next((word for word in words if word in self.commands), "")
        try:
            Reporter(verb or "usage", as_json=True).fail("usage", 2, message, f"See `{f'bkn {verb}'.strip()} --help`.")
        except typer.Exit as end:
            return end.exit_code


app = typer.Typer(
    name="bkn",
    cls=Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train networks on one or two images per statistics group: Batch Kalman Normalization.\n\n"
    "Start with:\n  bkn train\n  bkn eval\n  bkn export model.onnx\n  bkn predict model.onnx IMAGES\n\n"
    "Exit codes:\n  0 success, 1 unexpected, 2 usage or recipe, 3 input missing or unreadable,\n"
    "  4 a check failed, 5 device not available or its memory too small, 6 diverged,\n"
    "  7 the folder is in use by another process, 8 an output cannot be written,\n"
    "  129 hang-up, 130 Ctrl-C, 143 SIGTERM",
)
app.command(cls=RecipeVerb)(train)
app.command("eval")(evaluate)
app.command(cls=RecipeVerb)(compare)
app.command()(export)
app.command()(predict)
app.command()(keys)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bkn {metadata.version('bkn')}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar=NO_VALUE, callback=_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass
