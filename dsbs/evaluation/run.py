"""The stage: predict what is missing, score all systems by one path, compare them with their baselines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dsbs.config import Recipe, base_of
from dsbs.errors import UserError
from dsbs.evaluation.external import take_outside
from dsbs.evaluation.latency import measure_latency, read_latency
from dsbs.evaluation.predict import (
    TEACHER,
    loader,
    mark_anew,
    predict_student,
    predict_teacher,
    prediction_file,
    read_predictions,
    student_predictions,
    trained_students,
)
from dsbs.evaluation.rationales import rationale_values
from dsbs.evaluation.score import score
from dsbs.evaluation.systems import (
    System,
    bill,
    break_evens,
    clusters_of,
    compare,
    label_efficiency_of,
    pairs,
    score_system,
)
from dsbs.files import atomic_write, write_json
from dsbs.progress import NoProgress, Progress
from dsbs.prompting import learned_source
from dsbs.records.results import Results
from dsbs.records.rows import Example, TrainedStudent
from dsbs.records.summary import results_markdown
from dsbs.run_folder import RunFolder, read_manifest, run_folder
from dsbs.students import megabytes
from dsbs.tasks import make_task
from dsbs.tasks.base import Task
from dsbs.tasks.data import load, survey


def evaluate(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
    score_only: bool = False,
) -> Results:
    """Predict the split with every student of the recipe and compare them all: the teacher and ``eval.predictions`` included.

    With ``score_only`` no model is loaded: prediction files are scored anew as they are. Writes ``eval/predictions/*.jsonl``,
    ``eval/results.json`` and ``eval/results.md``. Raises UserError where there is nothing to compare, a file is missing or no
    row has a gold label.
    """
    progress = progress or NoProgress()
    run = run_folder(recipe, out)
    task = make_task(recipe.task)
    students = _of_recipe(recipe, task, trained_students(run), run)
    missing = _missing(recipe, students)
    if missing:
        progress.say(f"not trained, or not finished: {', '.join(missing)}")
    rows = [row for row in load(recipe, task, recipe.eval.split) if row.label is not None]
    if not rows:
        raise UserError(
            f"no row of the {recipe.eval.split} split has a gold label, so nothing can be compared",
            hint="label some test rows; they are never trained on",
        )
    clusters = clusters_of(rows, recipe.eval.cluster)
    data: dict[str, str] = {recipe.eval.split: survey(rows).hash}
    with (
        RunFolder(run).lock("eval"),
        RunFolder(run).record("eval", recipe, data),
    ):
        systems = _systems(recipe, task, rows, run, students, progress, predicts=not score_only)
        teacher = next((one for one in systems if one.kind == "teacher"), None)
        references = {p.id: p.rationale for p in teacher.files[0].predictions} if teacher else {}
        for system in systems:
            members = _members(system)
            for member, scored in zip(members, system.files, strict=True):
                mark_anew(run, member, scored, task)
            if system.kind != "teacher":
                system.written = rationale_values(task, system.files, references)
        results = [score_system(system, task, clusters) for system in systems]
        chosen = pairs(systems, recipe.eval)
        versus = compare(chosen, clusters)
        results = [one.model_copy(update={"versus": versus.get(one.name, {})}) for one in results]
        baseline = chosen[0][1] if chosen else None
        spent, _ = bill(read_manifest(run / "annotate"), "train")
        found = Results(
            run=str(run),
            name=recipe.name,
            recipe=recipe.model_dump(mode="json"),
            data=data,
            task=recipe.task.name,
            split=recipe.eval.split,
            n=len(rows),
            cluster=recipe.eval.cluster,
            clusters=None if clusters is None else int(clusters.max()) + 1,
            baseline=baseline.name if baseline else None,
            headline=_headline(recipe, systems),
            reportable=recipe.task.limit is None
            and all(student.reportable for student in students),
            systems=results,
            label_efficiency=label_efficiency_of(
                systems, [one for one in (baseline, teacher) if one], clusters
            ),
            break_even=list(
                break_evens(systems, spent, teacher.usd_per_prediction if teacher else None)
            ),
        )
        write_json(run / "eval" / "results.json", found.as_json())
        with atomic_write(run / "eval" / "results.md") as file:
            file.write(results_markdown(found) + "\n")
    return found


def _systems(
    recipe: Recipe,
    task: Task,
    rows: Sequence[Example],
    run: Path,
    students: Sequence[TrainedStudent],
    progress: Progress,
    *,
    predicts: bool,
) -> list[System]:
    """The teacher, then the students, baselines and larger shares first, then the files from outside."""
    systems: list[System] = []
    if (
        predict_teacher(recipe, task, rows, run, needed=any(s.source is not None for s in students))
        is not None
    ):
        _, per_row = bill(read_manifest(run / "annotate"), recipe.eval.split)
        answers = score(task, rows, read_predictions(prediction_file(run, TEACHER)), TEACHER)
        systems.append(System(TEACHER, "teacher", [answers], usd_per_prediction=per_row))
    groups: dict[str, list[TrainedStudent]] = {}
    for student in sorted(students, key=lambda one: one.seed):
        groups.setdefault(student.system, []).append(student)
    baselines = list(recipe.eval.baseline)
    largest = max((student.subset for student in students), default=1.0)

    def rank(name: str) -> tuple[int, float, str]:
        first = groups[name][0]
        place = baselines.index(first.method) if first.method in baselines else len(baselines)
        return place, -first.subset, name

    for name in sorted(groups, key=rank):
        members = groups[name]
        timed = read_latency(run, members[0], recipe)
        if predicts:
            models = {student.name: loader(student) for student in members}
            for student in members:
                predict_student(recipe, student, rows, run, progress, models[student.name])
            if members[0].subset == largest:  # less data makes no other speed
                timed = measure_latency(
                    recipe, members[0], rows, run, progress, models[members[0].name]
                )
        systems.append(
            System(
                name,
                "student",
                [
                    score(task, rows, student_predictions(run, student), student.name)
                    for student in members
                ],
                students=members,
                training_rows=_training_rows(members[0]),
                megabytes=_size(members[0]),
                latency=timed,
            )
        )
    outside = take_outside(recipe, task, rows, run)
    scored = [
        score(task, rows, read_predictions(prediction_file(run, name)), name) for name in outside
    ]
    return systems + [
        System(name, "external", [one]) for name, one in zip(outside, scored, strict=True)
    ]


def _members(system: System) -> list[str]:
    """The names of a system's prediction files."""
    return [student.name for student in system.students] or [system.name]


def _headline(recipe: Recipe, systems: Sequence[System]) -> str | None:
    """The system that the recipe is about: on the largest share that of its first method which is no baseline, or else of its
    last baseline. Without students the first from outside that is no baseline. None where that is not there.
    """
    baselines = recipe.eval.baseline
    if any(one.students for one in systems):
        methods = sorted(
            recipe.train.methods,
            key=lambda name: -baselines.index(name) if name in baselines else -len(baselines),
        )
        ours = [one for one in systems if one.method == methods[0]]
        best = max(
            ours,
            key=lambda one: (one.subset or 0.0, one.students[0].labels == recipe.train.labels[0]),
            default=None,
        )
        return best.name if best else None
    outside = [one.name for one in systems if one.kind == "external"]
    known = [name for name in outside if name in baselines] or outside[:1]
    return next((name for name in [*outside, *known] if name not in known), None)


def _size(student: TrainedStudent) -> float | None:
    """Of its weights, in megabytes; None where they have been taken elsewhere: scores need none."""
    try:
        return megabytes(student.path)
    except UserError:
        return None


def _training_rows(student: TrainedStudent) -> int | None:
    record = json.loads((Path(student.path) / "train.json").read_text(encoding="utf-8"))
    rows = record.get("rows")
    return rows if isinstance(rows, int) else None


def _of_recipe(
    recipe: Recipe, task: Task, students: list[TrainedStudent], run: Path
) -> list[TrainedStudent]:
    wanted = [
        s for s in students if s.method in recipe.train.methods and s.seed in recipe.train.seeds
    ]
    free = ("finetune", "distill")  # their labels are in their names
    wanted = [s for s in wanted if base_of(s.method) in free or s.labels in recipe.train.labels]
    wanted = [s for s in wanted if s.subset in recipe.train.subset]
    if not wanted and not recipe.eval.predictions:
        raise UserError(
            f"{run}/train has no finished student of this recipe",
            hint="run `dsbs train` with this recipe first, or name prediction files from elsewhere in eval.predictions",
        )
    source = learned_source(recipe, task)
    others = [
        s.name
        for s in wanted
        if s.settings != recipe.training_of(s.method) or s.source not in (None, source)
    ]
    if others:
        raise UserError(
            f"{', '.join(others)}: trained by other settings, or on another teacher's annotations, than this recipe's",
            hint="run `dsbs train` with this recipe: students that fit are kept, others are set aside",
        )
    return wanted


def _missing(recipe: Recipe, students: list[TrainedStudent]) -> list[str]:
    """Seeds that a method's other students have been trained with and this recipe asks for as well."""
    names = {student.name for student in students}
    systems = sorted({student.system for student in students})
    return [
        name
        for system in systems
        for seed in recipe.train.seeds
        if (name := f"{system}-s{seed}") not in names
    ]
