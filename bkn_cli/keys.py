"""`bkn keys`."""

from __future__ import annotations

from typing import Annotated

import typer

from bkn_cli.completion import complete_start
from bkn_cli.light import recipes_alone
from bkn_cli.options import Json, Verbose
from bkn_cli.reporting import reporting


def keys(
    start: Annotated[
        str,
        typer.Argument(
            metavar="PREFIX", help="Only keys that begin so, such as norm or lr.", autocompletion=complete_start
        ),
    ] = "",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """List the keys of a recipe, each with its default, its meaning and what is allowed.

    Examples:
      bkn keys
      bkn keys norm
      bkn keys optim.lr
    """
    with recipes_alone(), reporting("keys", as_json=as_json, verbose=verbose) as reporter:
        from rich.table import Table

        from bkn_core.recipe_keys import recipe_keys

        found = recipe_keys(start)
        caption = "What a recipe says of a key shows `bkn train RECIPE --print-config`."
        table = Table(show_lines=len(found) > 1, caption=caption, caption_justify="left")
        table.add_column("key", no_wrap=True)
        table.add_column("without recipe", overflow="fold")
        table.add_column("meaning, and what is allowed", overflow="fold")
        for key in found:
            table.add_row(key.name, key.default, f"{key.meaning}\n{key.allowed}")
        reporter.table(table)
        reporter.finish({"keys": [key._asdict() for key in found]}, {})
