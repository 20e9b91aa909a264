"""``dsbs review``: review annotations in a browser or a spreadsheet."""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dsbs.cli.common import Json, Out, Overrides, SetKeys, load, merged, print_json, progress
from dsbs.errors import UserError
from dsbs.formatting import count, listing

if TYPE_CHECKING:
    from dsbs.config import Recipe
    from dsbs.review.queue import Order
    from dsbs.review.run import PageInfo
    from dsbs.run_folder import RunFolder


RunOrRecipe = Annotated[
    str,
    typer.Argument(metavar="RUN|RECIPE", help="A run folder with annotations, or its recipe."),
]
SplitName = Annotated[
    str, typer.Option("--split", help="The split whose annotations are reviewed.")
]
ReviewerName = Annotated[
    str | None,
    typer.Option(
        "--reviewer",
        metavar="NAME",
        help="Name stored with each decision; editable on the page. Default: your user name.",
        show_default=False,
    ),
]
OrderName = Annotated[
    Literal["mistakes", "random", "file"],
    typer.Option("--order", help="Order of the rows; can be changed on the page."),
]
Port = Annotated[
    int,
    typer.Option(
        "--port",
        min=0,
        max=65535,
        help="Port on 127.0.0.1. 0: the run's previous one, or a free one.",
    ),
]
NoBrowser = Annotated[
    bool, typer.Option("--no-browser", help="Print the address instead of opening a browser.")
]
ExportCsv = Annotated[
    str | None,
    typer.Option(
        "--export-csv",
        metavar="FILE",
        help="Write rows and decisions to a CSV file instead of serving the page.",
        show_default=False,
    ),
]
ImportCsv = Annotated[
    str | None,
    typer.Option(
        "--import-csv",
        metavar="FILE",
        help="Read decisions from a CSV file that --export-csv wrote and people edited.",
        show_default=False,
    ),
]


def review(
    run: RunOrRecipe,
    overrides: Overrides = None,
    split: SplitName = "train",
    reviewer: ReviewerName = None,
    order: OrderName = "mistakes",
    port: Port = 0,
    no_browser: NoBrowser = False,
    export_csv: ExportCsv = None,
    import_csv: ImportCsv = None,
    out: Out = None,
    set_keys: SetKeys = None,
    as_json: Json = False,
) -> None:
    """Review a run's annotations: accept, correct or reject labels and rationales.

    Serves a page on this machine only; its address contains a secret token. Decisions are saved
    immediately to review/<split>.jsonl in the run and used by the next training. Stop with Ctrl-C.
    """
    name = reviewer.strip() if reviewer is not None else _user_name()
    if not name or not name.isprintable() or len(name) > 80:
        raise UserError(
            "--reviewer needs 1 to 80 printable characters", hint="for example --reviewer ann"
        )
    if export_csv is not None and import_csv is not None:
        raise UserError(
            "--export-csv and --import-csv exclude each other", hint="run one after the other"
        )
    recipe, folder = _recipe_and_run(run, merged(overrides, set_keys), out)
    if export_csv is not None:
        _export(recipe, folder, split, order, Path(export_csv), as_json)
    elif import_csv is not None:
        _import(recipe, folder, split, Path(import_csv), name, as_json)
    else:
        from dsbs.review.run import review as serve

        state = serve(
            recipe,
            folder,
            lambda page: _announce(page, folder, split, as_json),
            reviewer=name,
            split=split,
            port=port,
            order=order,
            progress=progress(),
            opens_browser=not no_browser and not as_json and _has_screen(),
        )
        print(f"{count(state['reviewed'], 'row')} reviewed", file=sys.stderr)


def _recipe_and_run(run: str, overrides: list[str], out: str | None) -> tuple[Recipe, RunFolder]:
    """The recipe and the run folder that an argument names."""
    from dsbs.review.run import recorded_recipe
    from dsbs.run_folder import RunFolder

    if not Path(run).is_dir():
        recipe = load(run, overrides)
        return recipe, RunFolder.of(recipe, out)
    if overrides or out is not None:
        raise UserError(
            f"overrides and --out belong to a recipe, and {run} is a run folder",
            hint="leave them out, or give the recipe instead of the folder",
        )
    folder = RunFolder(run)
    return recorded_recipe(folder), folder


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user without a name
        return "reviewer"


def _has_screen() -> bool:
    """Whether somebody sits at a terminal of a graphical desktop."""
    has_desktop = sys.platform in ("win32", "darwin") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    return has_desktop and sys.stderr.isatty()


def _announce(page: PageInfo, folder: RunFolder, split: str, as_json: bool) -> None:
    if as_json:
        print_json({"url": page.url, "rows": page.rows, "reviewed": page.reviewed, "pid": page.pid})
    else:
        print(f"{count(page.rows, 'row')}, {page.reviewed:,} reviewed; open {page.url}")
        print(f"decisions: {folder.reviews(split)} (Ctrl-C stops the server)", file=sys.stderr)
    sys.stdout.flush()


def _export(
    recipe: Recipe, folder: RunFolder, split: str, order: Order, path: Path, as_json: bool
) -> None:
    from dsbs.records.reviews import read_reviews
    from dsbs.review.queue import load_rows, ordered
    from dsbs.review.spreadsheet import export_csv
    from dsbs.tasks import make_task

    rows = load_rows(recipe, folder, split, progress=progress())
    reviews = read_reviews(folder.reviews(split))
    items = ordered(rows, make_task(recipe.task), order=order, reviews=reviews)
    export_csv(path, items, reviews)
    if as_json:
        print_json({"file": str(path), "rows": len(rows)})
    else:
        print(f"{path}: {count(len(rows), 'row')}")


def _import(
    recipe: Recipe, folder: RunFolder, split: str, path: Path, reviewer: str, as_json: bool
) -> None:
    from dsbs.review.queue import load_rows
    from dsbs.review.spreadsheet import import_csv
    from dsbs.tasks import make_task

    rows = load_rows(recipe, folder, split, with_student=False)
    result = import_csv(path, rows, make_task(recipe.task), folder, split, reviewer)
    if as_json:
        print_json({"saved": result.saved, "unchanged": result.unchanged})
    else:
        saved = listing(result.saved) or "none"
        print(f"saved: {saved}; {result.unchanged:,} unchanged, {result.undecided:,} undecided")
