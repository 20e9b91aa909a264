"""``dsbs compare-teachers``: several teachers on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsbs.cli.common import (
    Json,
    Out,
    RecipePath,
    SetKeys,
    load,
    print_json,
    print_table,
    progress,
)
from dsbs.errors import UserError

if TYPE_CHECKING:
    from dsbs.config import Recipe
    from dsbs.project.compare_teachers import TeacherComparison

HEADINGS = (
    "teacher",
    "label accuracy",
    "to the first (Holm)",
    "parse rate",
    "dollars/rationale",
    "s/reply",
    "agrees with",
)


def compare_teachers(
    recipe: RecipePath,
    teachers: Annotated[
        list[str],
        typer.Argument(
            metavar="TEACHER…",
            help="Files with a `teacher:` section, or changes to the recipe's own: "
            "model=a,base_url=b.",
        ),
    ],
    rows: Annotated[int, typer.Option(min=1, help="Rows in the sample.")] = 100,
    overrides: SetKeys = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Ask several teachers for the same rows; compare accuracy, agreement, price and speed."""
    from dsbs.project.compare_teachers import compare_teachers as run

    recipes = _recipes(recipe, teachers, overrides or [])
    result = run(recipes, rows=rows, out=out, progress=progress())
    if as_json:
        print_json(result.as_json())
    else:
        _print_result(result)


def _recipes(recipe: str, teachers: list[str], overrides: list[str]) -> dict[str, Recipe]:
    """The recipe once for each teacher, by the teacher's name."""
    recipes: dict[str, Recipe] = {}
    for teacher in teachers:
        if teacher.endswith((".yaml", ".yml")):
            name = Path(teacher).stem
            changes = [f"teacher={teacher}"]
        else:
            name = teacher
            changes = [f"teacher.{change.strip()}" for change in teacher.split(",")]
        if name in recipes:
            raise UserError(f"two teachers are called {name}", hint="rename one of the files")
        recipes[name] = load(recipe, [*overrides, *changes])
    return recipes


def _print_result(result: TeacherComparison) -> None:
    from dsbs.records.intervals import percent

    rows = []
    for contender in result.contenders:
        versus = result.versus.get(contender.name)
        usd = contender.usd_a_rationale
        seconds = contender.seconds_a_reply
        agreement = result.agreement[contender.name].items()
        rows.append(
            [
                contender.name,
                percent(contender.summary.label_accuracy),
                f"{100 * versus['delta']:+.1f} (p {versus['p_holm']:.3f})" if versus else "–",
                percent(contender.parse_rate),
                "–" if usd is None else f"{usd:.6f}",
                "–" if seconds is None else f"{seconds:.2f}",
                ", ".join(f"{other} {100 * share:.0f}%" for other, share in agreement),
            ]
        )
    print_table(HEADINGS, rows, title=f"{result.rows} rows, {result.with_gold} with gold")
    print(f"figures: {result.path}")
