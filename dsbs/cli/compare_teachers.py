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
from dsbs.formatting import ABSENT, count, dollars, p_value, percent, points_number, rate

if TYPE_CHECKING:
    from dsbs.config import Recipe
    from dsbs.project.compare_teachers import TeacherComparison

HEADINGS = (
    "teacher",
    "label accuracy",
    "vs. the first",
    "acceptance rate",
    "price/rationale",
    "s/reply",
    "agrees with",
)


def compare_teachers(
    recipe: RecipePath,
    teachers: Annotated[
        list[str],
        typer.Argument(
            metavar="TEACHER",
            help="Files with a `teacher:` section, or changes to the recipe's own: "
            "model=a,base_url=b.",
        ),
    ],
    rows: Annotated[int, typer.Option(min=1, help="Rows in the sample.")] = 100,
    overrides: SetKeys = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Annotate a sample with several teachers; compare accuracy, agreement, price and speed."""
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
    rows = []
    for contender in result.contenders:
        usd = contender.usd_per_rationale
        seconds = contender.seconds_per_reply
        agreement = result.agreement[contender.name].items()
        rows.append(
            [
                contender.name,
                rate(contender.summary.label_accuracy),
                _difference(result.versus.get(contender.name)),
                rate(contender.acceptance_rate),
                ABSENT if usd is None else dollars(usd),
                ABSENT if seconds is None else f"{seconds:.2f}",
                ", ".join(f"{other} {percent(share)}" for other, share in agreement),
            ]
        )
    print_table(HEADINGS, rows, title=f"{count(result.rows, 'row')}, {result.with_gold} with gold")
    print(f"figures: {result.path}")


def _difference(versus: dict[str, float] | None) -> str:
    if versus is None:
        return ABSENT
    return f"{points_number(versus['delta'])} ({p_value(versus['p_holm'])})"
