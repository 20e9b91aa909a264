"""``dsbs train``: train the recipe's students."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from dsbs.cli.common import (
    DryRun,
    Json,
    Out,
    Overrides,
    RecipePath,
    load,
    print_json,
    print_smoke_warning,
    progress,
)
from dsbs.formatting import count, duration, percent

if TYPE_CHECKING:
    from dsbs.training.run import TrainResult


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Out = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Train every student of the recipe; finished ones are kept, an interrupted one continues."""
    from dsbs.training import run as stage
    from dsbs.training.distributed import destroy_process_group, is_main_process

    loaded = load(recipe, overrides)
    if dry_run:
        lines = stage.planned(loaded, out)
        if as_json:
            print_json({"students": lines})
        else:
            print_train_plan(lines)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers send it, like Ctrl-C
    result = stage.train(loaded, out=out, progress=progress())
    destroy_process_group()
    if not is_main_process():
        return
    if as_json:
        print_json(result.as_json())
    else:
        print_train_result(result)


def print_train_plan(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        state = count(line["steps"], "step")
        if line["done"]:
            state = "already trained"
        elif line["trials"]:
            state += f", chosen among {line['trials']} trials"
        rows = count(line["rows"], "row")
        if line["valid"] is None:
            rows = f"at most {rows}"
        else:
            rows += f", {line['rationales']} with a rationale, {line['valid']} valid"
        print(f"{line['name']}: {rows}; {state}")


def print_train_result(result: TrainResult) -> None:
    print_smoke_warning(result.reportable)
    for student in result.students:
        print(
            f"{student.name}: valid accuracy {percent(student.valid_accuracy)} "
            f"at step {student.best_step} of {student.steps}; "
            f"{student.examples_per_s:.0f} examples/s, {duration(student.wall_s)}; {student.path}"
        )
        for name, value in student.tuned.items():
            print(f"  {name} {value:g}, chosen on valid")
