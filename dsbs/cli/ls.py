"""``dsbs ls``: list runs."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsbs.cli.common import Json, print_json, print_table
from dsbs.formatting import ABSENT, interval, percent, points_number, signed_interval

if TYPE_CHECKING:
    from dsbs.project.runs import RunState


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
    """List runs: the state of each stage, the students, and the headline of the evaluation."""
    from dsbs.project.runs import list_runs

    parent = folder or Path("runs")
    runs = [] if folder is None and not parent.exists() else list_runs(parent)
    if as_json:
        print_json({"runs": [run.as_json() for run in runs]})
        return
    if not runs:
        print(f"no runs in {parent}/; `dsbs run RECIPE` creates one")
        return
    _print_runs(runs)
    for run in runs:
        for problem in run.problems:
            print(f"{run.name}: {problem}")


def _print_runs(runs: list[RunState]) -> None:
    with_others = any(run.other_models for run in runs)
    headings = ["run", "annotate", "train", "students", "eval", "last change"]
    headings += ["headline", "accuracy", "vs. its baseline"]
    if with_others:
        headings.insert(4, "other models")
    rows = []
    for run in runs:
        row = [
            run.name,
            run.stages["annotate"] or ABSENT,
            run.stages["train"] or ABSENT,
            _students(run),
            run.stages["eval"] or ABSENT,
            _local_time(run.when),
            *_headline(run),
        ]
        if with_others:
            counts = ", ".join(f"{count} {name}" for name, count in run.other_models.items())
            row.insert(4, counts or ABSENT)
        rows.append(row)
    print_table(headings, rows)


def _students(run: RunState) -> str:
    if not run.stages["train"]:
        return ABSENT
    planned = "?" if run.planned is None else str(run.planned)
    return f"{run.finished}/{planned}"


def _local_time(when: str | None) -> str:
    if when is None:
        return ABSENT
    return datetime.fromisoformat(when).astimezone().strftime("%Y-%m-%d %H:%M")


def _headline(run: RunState) -> tuple[str, str, str]:
    """The headline system, its accuracy, and its difference to the first baseline."""
    headline = run.headline
    if headline is None:
        return ("see below" if run.problems else ABSENT, ABSENT, ABSENT)
    accuracy = f"{percent(headline.accuracy)} {interval(headline.ci95)}"
    system = headline.system
    if not run.reportable:
        system += " (smoke: not reportable)"
    if headline.versus is None:
        return system, accuracy, ABSENT
    versus = headline.versus
    delta = f"{points_number(versus.delta)} {signed_interval(versus.ci95)}"
    return system, accuracy, f"{delta} to {headline.baseline}"
