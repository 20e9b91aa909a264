"""Shared by the commands: common options, tables, JSON output, and rows read from text or JSONL."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsbs.errors import UserError

if TYPE_CHECKING:
    from dsbs.config import Recipe
    from dsbs.progress import Progress

RecipePath = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe's YAML file, or one that ships with dsbs: recipes/demo.yaml.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Override recipe keys, e.g. train.max_steps=200.",
        show_default=False,
    ),
]
SetKeys = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a recipe key: key=value.", show_default=False),
]
Out = Annotated[
    str | None,
    typer.Option("--out", help="Run folder. Default: runs/<recipe name>.", show_default=False),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what the command would do, without doing it.")
]
_PIPE_WIDTH = 160  # columns of a table that is not printed to a terminal


def load(recipe: str, overrides: list[str] | None) -> Recipe:
    from dsbs.config.load import load_recipe

    return load_recipe(recipe, overrides or [])


def progress() -> Progress:
    from dsbs.progress import make_progress

    return make_progress()


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, default=list))


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    numeric: bool = False,
) -> None:
    """Print a table on stdout, as wide as the terminal.

    ``numeric`` right-aligns all columns but the first.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        is_number = numeric and index > 0
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(width=width, highlight=False, markup=False).print(table)


def read_rows(file: str) -> Iterator[tuple[int, str | dict[str, Any]]]:
    """Line number and row of each non-empty line in a file or, for ``-``, on stdin.

    A line that begins with ``{`` is a JSON object, any other is text. Raises UserError.
    """
    from dsbs.files import find_file, open_text

    hint = "give a text or JSONL file, or - for stdin"
    if file == "-":
        source: Any = nullcontext(sys.stdin)
    else:
        source = open_text(find_file(file, what="input file", hint=hint))
    with source as lines:
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if text.startswith("{"):
                yield number, _parse_object(text, f"{file}:{number}")
            elif text:
                yield number, text


def _parse_object(text: str, where: str) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(
            f"{where}: not valid JSON", hint="a line is a JSON object or plain text"
        ) from None
    return row


def indent(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.split("\n"))


def print_smoke_warning(reportable: bool) -> None:
    if not reportable:
        print("smoke: not reportable (task.limit is set)")
