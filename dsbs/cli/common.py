"""What the commands share: the options that they have in common, and how they print."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

RecipePath = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A recipe's YAML file, or a shipped one: recipes/demo.yaml."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]…",
        help="Override recipe keys, e.g. train.max_steps=200.",
        show_default=False,
    ),
]
Out = Annotated[
    str | None,
    typer.Option("--out", help="Run folder. Default: runs/<recipe name>.", show_default=False),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


def load(recipe: str, overrides: list[str] | None) -> Any:
    from dsbs.config.load import load_recipe

    return load_recipe(recipe, overrides or [])


def progress() -> Any:
    from dsbs.progress import make_progress

    return make_progress()


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, default=list))


def indented(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.split("\n"))


def dollars(usd: float | None) -> str:
    return "of unknown price" if usd is None else f"{usd:.4f} dollars"


def stamp(reportable: bool) -> None:
    if not reportable:
        print("smoke: not reportable (task.limit is set)")
