"""``dsbs run``: annotate, train, evaluate and report in one command."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from dsbs.cli.common import (
    DryRun,
    Json,
    Out,
    Overrides,
    RecipePath,
    SetKeys,
    load,
    print_annotate_plan,
    print_annotate_result,
    print_json,
    print_results,
    print_train_plan,
    print_train_result,
    progress,
)
from dsbs.errors import UserError

if TYPE_CHECKING:
    from dsbs.annotation.summary import AnnotateResult
    from dsbs.config import Recipe


def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    set_keys: SetKeys = None,
    out: Out = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Run all stages: annotate, train, eval and report.

    An interrupted run continues when the command is run again: no reply is paid for twice and
    finished students are kept. If rows are left without a reply, the run stops before training
    with exit code 3.
    """
    loaded = load(recipe, overrides, set_keys)
    if dry_run:
        _print_plan(loaded, out, as_json)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "dsbs run uses a single process",
            hint="run annotate, then train with the launcher, then eval and report",
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers send it, like Ctrl-C
    summaries: dict[str, Any] = {}
    try:
        _run_stages(loaded, out, summaries, as_json)
    finally:
        if as_json:
            print_json(summaries)


def _run_stages(recipe: Recipe, out: str | None, summaries: dict[str, Any], as_json: bool) -> None:
    """Run the stages in order; ``summaries`` receives what each prints with ``--json``."""
    from dsbs.annotation.run import annotate
    from dsbs.evaluation.run import evaluate
    from dsbs.project.validate import validate
    from dsbs.records.summary import closing
    from dsbs.reporting.run import write_report
    from dsbs.run_folder import RunFolder
    from dsbs.training.run import train

    validate(recipe)  # what a later stage would refuse costs nothing yet
    annotations = annotate(recipe, out=out, progress=progress())
    summaries["annotate"] = annotations.as_json()
    if not as_json:
        _print_heading("1/4 annotate")
        print_annotate_result(annotations)
    error = annotations.error()
    if error is not None:
        raise error
    training = train(recipe, out=out, progress=progress())
    summaries["train"] = training.as_json()
    if not as_json:
        _print_heading("2/4 train")
        print_train_result(training)
    results = evaluate(recipe, out=out, progress=progress())
    summaries["eval"] = results.as_json()
    if not as_json:
        _print_heading("3/4 eval")
        print_results(results)
    report = write_report([RunFolder.of(recipe, out).path])
    summaries["report"] = report.as_json()
    if not as_json:
        _print_heading("4/4 report")
        print(report.page)
        print(closing(results, _teacher_accuracy(annotations)))


def _teacher_accuracy(annotations: AnnotateResult) -> float | None:
    """The teacher's accuracy on the train rows; None without gold labels."""
    train = annotations.splits.get("train")
    rate = None if train is None else train.label_accuracy
    return None if rate is None else rate.value


def _print_heading(title: str) -> None:
    print(f"== {title}")
    sys.stdout.flush()


def _print_plan(recipe: Recipe, out: str | None, as_json: bool) -> None:
    """Print what annotation would send and what training would do; nothing is sent or written."""
    from dsbs.annotation.backends import teacher_class
    from dsbs.annotation.planning import plan
    from dsbs.project.validate import validate

    validate(recipe)
    is_asked = teacher_class(recipe.teacher.kind).is_asked
    annotation = plan(recipe, out) if is_asked else None
    students, is_annotated = _plan_training(recipe, out)
    if as_json:
        annotate_plan = None if annotation is None else annotation.as_json()
        print_json({"annotate": annotate_plan, "train": {"students": students}})
        return
    _print_heading("1/4 annotate")
    if annotation is None:
        print(f"no requests are sent to a teacher of kind {recipe.teacher.kind}")
    else:
        print_annotate_plan(annotation)
    _print_heading("2/4 train")
    print_train_plan(students)
    if not is_annotated:
        print("Before annotation, these row counts are upper bounds.")
    _print_heading("3/4 eval, 4/4 report")
    print(f"all systems on the {recipe.eval.split} rows")


def _plan_training(recipe: Recipe, out: str | None) -> tuple[list[dict[str, Any]], bool]:
    """The students to train, and whether their rows are annotated already."""
    from dsbs.training.run import planned

    try:
        return planned(recipe, out), True
    except UserError:  # the recipe is valid, so annotations are missing or do not fit it
        return planned(recipe, out, annotated=False), False
