"""``dsbs doctor``: check this machine and a recipe's data, keys, endpoints and models."""

from __future__ import annotations

from typing import Annotated

import typer

from dsbs.cli.common import Json, Out, Overrides, SetKeys, merged, print_json
from dsbs.errors import DsbsError
from dsbs.formatting import count


def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe: its needs are checked as well as the machine.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    set_keys: SetKeys = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Check this machine and, with RECIPE, its data, key, endpoints and models.

    Sends no paid request and writes nothing.
    """
    from dsbs.project.doctor import examine

    checks = examine(recipe, merged(overrides, set_keys), out)
    problems = [check for check in checks if check.status == "problem"]
    if as_json:
        warnings = sum(check.status == "warning" for check in checks)
        lines = [check.as_json() for check in checks]
        print_json({"checks": lines, "problems": len(problems), "warnings": warnings})
    else:
        width = max(len(check.name) for check in checks)
        margin = " " * (width + 11)
        for check in checks:
            message = check.message.replace("\n", "\n" + margin)
            print(f"{check.status:<7}  {check.name:<{width}}  {message}")
            if check.hint is not None:
                print(f"{margin}try: {check.hint}")
    if problems:
        names = ", ".join(dict.fromkeys(check.name for check in problems))
        raise DsbsError(
            f"{count(len(problems), 'problem')}: {names}",
            hint="follow the hints above, then run the same command",
        )
