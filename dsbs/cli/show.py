"""``dsbs show``: a recipe with all its keys, or the difference between two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsbs.cli.common import Json, SetKeys, print_json, print_table
from dsbs.errors import UserError
from dsbs.formatting import ABSENT

if TYPE_CHECKING:
    from dsbs.project.runs import ResolvedRecipe


def show(
    source: Annotated[
        str, typer.Argument(metavar="RECIPE|RUN", help="A recipe's YAML file, or a run folder.")
    ],
    other: Annotated[
        str | None,
        typer.Argument(
            metavar="OTHER",
            help="A second recipe or run: show only the differences.",
            show_default=False,
        ),
    ] = None,
    overrides: SetKeys = None,
    as_json: Json = False,
) -> None:
    """Show a recipe with all its keys, those that differ from the default marked; or compare two.

    --set overrides keys of the first recipe.
    """
    from dsbs.project.runs import resolve_recipe

    first = resolve_recipe(source, overrides)
    if other is not None:
        _print_difference(first, other, as_json)
    elif as_json:
        print_json(first.as_json())
    else:
        print(first.as_yaml())


def _print_difference(first: ResolvedRecipe, other: str, as_json: bool) -> None:
    from dsbs.config.diff import MISSING, differences, inline_yaml
    from dsbs.project.runs import resolve_recipe

    if "=" in other and not Path(other).exists():
        raise UserError(
            f"{other} is neither a recipe nor a run", hint=f"override keys with --set {other}"
        )
    second = resolve_recipe(other)
    changes = differences([first.recipe, second.recipe])
    if as_json:
        differs = {
            key: {"a": None if a is MISSING else a, "b": None if b is MISSING else b}
            for key, (a, b) in changes.items()
        }
        print_json({"a": first.source, "b": second.source, "differs": differs})
        return
    if not changes:
        print(f"{first.source} and {second.source} are the same recipe")
        return
    rows = [
        [key, *(ABSENT if value is MISSING else inline_yaml(value) for value in pair)]
        for key, pair in changes.items()
    ]
    print_table(("key", first.source, second.source), rows)
