"""``dsbs report``: one HTML page about one run or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsbs.cli.common import Json, SetKeys, load, print_json
from dsbs.errors import UserError


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|KEY=VALUE",
            help="Run folders, or recipes with overrides (their run folders are used), "
            "e.g. runs/small runs/base.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="For one recipe: its run folder. Otherwise: where to write the report; default: "
            "the run folder, or runs/report-<names> for several runs.",
            show_default=False,
        ),
    ] = None,
    set_keys: SetKeys = None,
    as_json: Json = False,
) -> None:
    """Write report.html, tables and figures for one run, or for several side by side."""
    from dsbs.reporting.run import write_report

    folders, target = _folders([*runs, *(set_keys or ())], out)
    written = write_report(folders, out=target)
    if as_json:
        print_json(written.as_json())
    else:
        print(written.page)


def _folders(arguments: list[str], out: str | None) -> tuple[list[Path], str | None]:
    """The run folders that the arguments name, and where to write the report.

    ``--out`` of a single recipe is its run folder.
    """
    from dsbs.run_folder import RunFolder

    overrides = [text for text in arguments if "=" in text and not Path(text).exists()]
    runs = [text for text in arguments if text not in overrides]
    recipes = [text for text in runs if not Path(text).is_dir()]
    if not runs:
        raise UserError(
            "no run given",
            hint="dsbs report RUN: a run folder or a recipe, with overrides after it",
        )
    if overrides and not recipes:
        raise UserError(
            f"{overrides[0]}: only a recipe can be overridden, and {runs[0]} is a run folder",
            hint="leave the overrides out, or give the recipe instead of the folder",
        )
    for name in recipes:
        if not name.endswith((".yaml", ".yml")) and not Path(name).is_file():
            raise UserError(
                f"{name} is neither a run folder nor a recipe",
                hint="give a folder such as runs/demo, or a .yaml file",
            )
    if recipes and len(runs) == 1:
        return [RunFolder.of(load(runs[0], overrides), out).path], None
    folders = [
        RunFolder.of(load(name, overrides)).path if name in recipes else Path(name) for name in runs
    ]
    return folders, out
