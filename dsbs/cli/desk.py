"""The commands around the stages: init, ls, show, doctor, schema."""

from __future__ import annotations

import sys
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dsbs.cli.common import Json, Out, Overrides, print_json
from dsbs.errors import DsbsError, UserError


class Template(StrEnum):
    classification = "classification"
    generation = "generation"
    nli = "nli"
    math = "math"


def init(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="Of the new folder, and of the recipe and its runs."),
    ],
    template: Annotated[
        Template,
        typer.Option(
            help="classification: a closed set of labels; generation: free text; nli: premise and hypothesis; "
            "math: word problems and equations."
        ),
    ] = Template.classification,
    as_json: Json = False,
) -> None:
    """Make a folder with a recipe, a prompt and sample rows, ready to be run and to be changed into your own."""
    from dsbs.project.init import init as run

    folder = run(name, template.value)
    if as_json:
        print_json({"folder": str(folder), "files": sorted(path.name for path in folder.iterdir())})
        return
    print(f"{folder}/: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    print(f"next:\n  cd {folder}\n  dsbs validate recipe.yaml\n  dsbs doctor recipe.yaml")
    print("README.md there has the rest; recipe.yaml says in comments what to change.")


def ls(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER",
            help="The folder that holds the runs. Default: runs.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the runs: how far each stage came, its students, and the headline of its evaluation."""
    from dsbs.project.runs import list_runs

    where = folder or Path("runs")
    runs = [] if folder is None and not where.exists() else list_runs(where)
    if as_json:
        print_json({"runs": [run.as_json() for run in runs]})
        return
    if not runs:
        print(f"no runs in {where}/: `dsbs annotate RECIPE` makes one")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    headings = [
        "run",
        "annotate",
        "train",
        "students",
        "eval",
        "when",
        "headline",
        "accuracy",
        "to its baseline",
    ]
    beside = ["beside them"] if any(run.beside for run in runs) else []
    for heading in [*headings[:4], *beside, *headings[4:]]:
        table.add_column(heading, overflow="fold")
    for run in runs:
        stages = {stage: status or "–" for stage, status in run.stages.items()}
        students = (
            f"{run.finished}/{'?' if run.planned is None else run.planned}"
            if run.stages["train"]
            else "–"
        )
        when = (
            datetime.fromisoformat(run.when).astimezone().strftime("%Y-%m-%d %H:%M")
            if run.when
            else "–"
        )
        more = (
            [", ".join(f"{count} {name}" for name, count in run.beside.items()) or "–"]
            if beside
            else []
        )
        table.add_row(
            run.name,
            stages["annotate"],
            stages["train"],
            students,
            *more,
            stages["eval"],
            when,
            *_headline(run),
        )
    Console(width=None if sys.stdout.isatty() else 180, highlight=False, markup=False).print(table)
    for run in runs:
        for problem in run.problems:
            print(f"{run.name}: {problem}")


def _headline(run: Any) -> tuple[str, str, str]:
    found = run.headline
    if found is None:
        return "–" if not run.problems else "see below", "–", "–"
    low, high = (100 * end for end in found.ci95)
    accuracy = f"{100 * found.accuracy:.1f} % [{low:.1f}, {high:.1f}]"
    smoke = "" if run.reportable else " (smoke: not reportable)"
    if found.versus is None:
        return found.system + smoke, accuracy, "–"
    low, high = (100 * end for end in found.versus.ci95)
    gap = f"{100 * found.versus.delta:+.1f} [{low:+.1f}, {high:+.1f}] to {found.baseline}"
    return found.system + smoke, accuracy, gap


def show(
    given: Annotated[
        str, typer.Argument(metavar="RECIPE|RUN", help="A recipe's YAML file, or a run folder.")
    ],
    other: Annotated[
        str | None,
        typer.Argument(
            metavar="OTHER", help="A second one: only what differs is shown.", show_default=False
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Override keys of the first, a recipe: key=value.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a recipe with nothing left out and what is not the default marked; of two, what differs."""
    from dsbs.project.show import ABSENT, differences, plain, resolve

    first = resolve(given, overrides)
    if other is None:
        print_json(first.as_json()) if as_json else print(first.as_yaml())
        return
    if "=" in other and not Path(other).exists():
        raise UserError(
            f"{other} is neither a recipe nor a run", hint=f"override keys by --set {other}"
        )
    second = resolve(other)
    found = differences(first.recipe, second.recipe)
    if as_json:
        told = {
            key: {"a": None if a is ABSENT else a, "b": None if b is ABSENT else b}
            for key, (a, b) in found.items()
        }
        print_json({"a": first.source, "b": second.source, "differs": told})
        return
    if not found:
        print(f"{first.source} and {second.source} are the same recipe")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("key", first.source, second.source):
        table.add_column(heading, overflow="fold")
    for key, pair in found.items():
        table.add_row(key, *("–" if value is ABSENT else plain(value) for value in pair))
    Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False).print(table)


def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="A recipe, whose needs are looked at too.", show_default=False
        ),
    ] = None,
    overrides: Overrides = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Look at this machine and, with RECIPE, at its data, key, endpoints and models. Buys nothing, writes nothing."""
    from dsbs.project.doctor import examine

    found = examine(recipe, overrides or [], out)
    problems = [check for check in found if check.status == "problem"]
    if as_json:
        warnings = sum(check.status == "warning" for check in found)
        print_json(
            {
                "checks": [check.as_json() for check in found],
                "problems": len(problems),
                "warnings": warnings,
            }
        )
    else:
        width = max(len(check.name) for check in found)
        for check in found:
            said = check.said.replace("\n", "\n" + " " * (width + 11))
            print(f"{check.status:<7}  {check.name:<{width}}  {said}")
            if check.hint is not None:
                print(f"{'':<{width + 11}}try: {check.hint}")
    if problems:
        names = ", ".join(dict.fromkeys(check.name for check in problems))
        raise DsbsError(
            f"{len(problems)} problems: {names}",
            hint="do what these lines say, then run the same command",
        )


def schema(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Write it there. Default: stdout.", show_default=False
        ),
    ] = None,
) -> None:
    """Print the recipe's JSON schema, by which editors complete and check recipes."""
    import json

    from dsbs.config.schema import recipe_schema

    text = json.dumps(recipe_schema(), ensure_ascii=False, indent=2)
    if out is None:
        print(text)
        return
    from dsbs.files import atomic_write

    with atomic_write(out) as file:
        file.write(text + "\n")
    print(f"{out}\nIn a recipe's first line: # yaml-language-server: $schema={out}")
