"""What a shell is told when it asks how a word could end."""

from __future__ import annotations

import typer

from bkn_cli.light import recipes_alone

Offers = list[tuple[str, str]]


def complete_word(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer recipes, keys and the values of keys."""
    before: list[str] = list(ctx.params.get("words") or [])
    parts = [*before, incomplete]
    if "=" in parts[-2:]:  # bash makes three words of KEY=VALUE
        at = len(parts) - 1 - parts[::-1].index("=")
        return _values(parts[at - 1], "".join(parts[at + 1 :]), "")
    if not incomplete and before and (values := _values(before[-1], "", "")):  # the cursor is behind that sign
        return values
    key, equals, value = incomplete.partition("=")
    if equals:
        return _values(key, value, f"{key}=")
    found = _keys(incomplete)
    if len(found) == 1 and (values := _values(found[0][0], "", f"{found[0][0]}=")):
        return values  # so that no space comes behind the equals sign
    with recipes_alone():
        from bkn_core.recipe import shipped_recipes

        names = [] if any("=" not in word for word in before) else shipped_recipes()
    return [(name, "recipe") for name in names if name.startswith(incomplete)] + [(f"{k}=", text) for k, text in found]


def complete_start(incomplete: str) -> Offers:
    """Offer the names of keys."""
    return _keys(incomplete)


def complete_norms(incomplete: str) -> Offers:
    """Offer norms, after those that are there already."""
    head, comma, last = incomplete.rpartition(",")
    return [(f"{head}{comma}{norm}", text) for norm, text in _values("norm.kind", last, "")]


def _keys(start: str) -> Offers:
    with recipes_alone():
        from bkn_core.recipe_keys import recipe_keys

        return [(key.name, key.meaning) for key in recipe_keys() if key.name.startswith(start)]


def _values(name: str, start: str, before: str) -> Offers:
    with recipes_alone():
        from bkn_core.recipe_keys import recipe_keys

        key = next((key for key in recipe_keys() if key.name == name), None)
    values = () if key is None else key.values or (key.default,)
    return [(f"{before}{value}", "") for value in values if value.startswith(start)]
