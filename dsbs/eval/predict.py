"""Prediction files: one line per row and system, written once per student, the teacher's from its annotations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsbs.annotations import annotation_file, load_annotations, run_folder
from dsbs.artefacts import canonical, digest, read_jsonl, write_jsonl
from dsbs.errors import UserError
from dsbs.progress import Meter
from dsbs.recipe import Recipe
from dsbs.records import Example, Prediction, TrainedStudent
from dsbs.student import Student
from dsbs.tasks.base import Task

TEACHER = "teacher"


def trained_students(run: Path) -> list[TrainedStudent]:
    """Every finished student of a run. Raises UserError for a record that cannot be read."""
    found = []
    for record in sorted((run / "train").glob("*/train.json")):
        try:
            said = json.loads(record.read_text(encoding="utf-8"))["student"]
            found.append(TrainedStudent.model_validate(said | {"path": str(record.parent)}))  # the run may have moved
        except (ValueError, KeyError) as error:
            raise UserError(f"{record} is not a training record ({error!r})", hint="train that student again") from None
    return found


def best_student(recipe: Recipe, out: str | Path | None = None, *, needs_rationales: bool = False) -> str:
    """Folder of the run's student that is most accurate on valid. Raises UserError where none is trained."""
    run = run_folder(recipe, out)
    students = [s for s in trained_students(run) if s.method not in ("finetune", "distill") or not needs_rationales]
    if not students:
        what = "student with rationales" if needs_rationales else "finished student"
        raise UserError(f"{run}/train has no {what}", hint="run `dsbs train` first")
    return max(students, key=lambda student: student.valid_accuracy).path


def prediction_file(run: Path, system: str) -> Path:
    return run / "eval" / "predictions" / f"{system}.jsonl"


def predict_student(recipe: Recipe, student: TrainedStudent, rows: Sequence[Example], run: Path, meter: Meter) -> Path:
    """The student's prediction file: kept where it fits the student and the rows, else made (and the old one set aside)."""
    path = prediction_file(run, student.name)
    made_by = digest(student.fingerprint, canonical([[row.id, row.input] for row in rows]), str(recipe.eval.max_label_tokens))
    there = _made_by(path)
    if there == made_by:
        return path
    aside = path.parent / "aside"
    if path.is_file():
        target = aside / f"{student.name}-{(there or 'unknown')[:12]}.jsonl"
        while target.exists():
            target = target.with_name(f"{target.stem}+.jsonl")
        aside.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    mine = aside / f"{student.name}-{made_by[:12]}.jsonl"
    if _made_by(mine) == made_by:
        mine.rename(path)
        return path
    meter.say(f"predict {recipe.eval.split}: {student.name}")
    model = Student.load(student.path)
    size = recipe.eval.batch_size
    inputs, most = [row.input for row in rows], recipe.eval.max_label_tokens
    model.predict(inputs[: min(size, 8)], batch_size=size, canonical=True)  # the first batch pays for start-up
    answers = model.predict(inputs, batch_size=size, max_label_tokens=most, canonical=True)
    write_jsonl(
        path,
        (
            Prediction(
                id=row.id,
                gold=row.label,
                raw=answer.raw,
                prediction=answer.label,
                correct=None if row.label is None else answer.label is not None and model.task.correct(answer.label, row.label),
                rationale=answer.rationale,
                latency_ms=round(answer.latency_ms, 4),
                made_by=made_by,
            ).model_dump_json(by_alias=True)
            for row, answer in zip(rows, answers, strict=True)
        ),
    )
    return path


def predict_teacher(recipe: Recipe, task: Task, rows: Sequence[Example], run: Path, *, needed: bool) -> Path | None:
    """The teacher's prediction file from its annotations of the split; None where it was not asked about that split.

    Where it is ``needed`` (a student learned from it) and was to be asked, missing annotations are a mistake.
    """
    if recipe.eval.split not in recipe.annotate.splits or recipe.teacher.kind == "human":
        return None
    if not annotation_file(run, recipe.eval.split).is_file() and not needed:
        return None
    annotations = load_annotations(recipe, task, run, recipe.eval.split)
    missing = [row.id for row in rows if row.id not in annotations]
    if missing:
        raise UserError(
            f"{len(missing)} {recipe.eval.split} rows have no annotation (first: {missing[0]})",
            hint="the data changed since: run `dsbs annotate` again",
        )

    def line(row: Example) -> str:
        annotation = annotations[row.id]
        own = annotation.own_label
        return Prediction(
            id=row.id,
            gold=row.label,
            raw=own or "",
            prediction=own,  # what it said without a hint
            correct=None if row.label is None else own is not None and task.correct(own, row.label),
            rationale=None if annotation.provenance == "hinted" else annotation.rationale,
            made_by=f"teacher:{annotation.teacher.kind}:{annotation.teacher.model}",
        ).model_dump_json(by_alias=True)

    path = prediction_file(run, TEACHER)
    write_jsonl(path, (line(row) for row in rows))
    return path


def read_predictions(path: Path) -> dict[str, Prediction]:
    """A prediction file by id. Raises UserError with file and line."""
    found: dict[str, Prediction] = {}
    for number, row in read_jsonl(path):
        try:
            prediction = Prediction.model_validate(row)
        except ValidationError as error:
            raise UserError(f"{path}:{number}: not a prediction ({error.errors()[0]['msg']})", hint="remove the file") from None
        if prediction.id in found:
            raise UserError(f"{path}:{number}: id {prediction.id!r} occurs twice", hint="remove the file and run again")
        found[prediction.id] = prediction
    return found


def _made_by(path: Path) -> str | None:
    try:
        first: dict[str, Any] = next(iter(read_jsonl(path)))[1]
    except (StopIteration, UserError, OSError):
        return None
    value = first.get("made_by")
    return value if isinstance(value, str) else None
