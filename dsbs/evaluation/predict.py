"""Prediction files: one line per row and system, written once per student, the teacher's from its annotations."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsbs.config import Recipe, base_of
from dsbs.errors import UserError
from dsbs.evaluation.score import Scored
from dsbs.files import canonical_json, digest, read_jsonl, write_jsonl
from dsbs.progress import Progress
from dsbs.prompting import source_fingerprint
from dsbs.records.rows import Annotation, Example, Prediction, Sample, TrainedStudent
from dsbs.run_folder import RunFolder, annotation_file, read_manifest, run_folder
from dsbs.students import Student, read_card
from dsbs.tasks.base import Task

TEACHER = "teacher"
Loader = Callable[[], Student]


def trained_students(run: Path) -> list[TrainedStudent]:
    """Every finished student of a run. Raises UserError for a record that cannot be read."""
    found = []
    for record in sorted((run / "train").glob("*/train.json")):
        try:
            said = json.loads(record.read_text(encoding="utf-8"))["student"]
            found.append(
                TrainedStudent.model_validate(said | {"path": str(record.parent)})
            )  # the run may have moved
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{record} is not a training record ({error!r})", hint="train that student again"
            ) from None
    return found


def best_student(
    recipe: Recipe, out: str | Path | None = None, *, needs_rationales: bool = False
) -> str:
    """Folder of the run's student that is most accurate on valid. Raises UserError where none is trained."""
    run = run_folder(recipe, out)
    students = [
        s
        for s in trained_students(run)
        if base_of(s.method) not in ("finetune", "distill") or not needs_rationales
    ]
    if not students:
        what = "student with rationales" if needs_rationales else "finished student"
        raise UserError(f"{run}/train has no {what}", hint="run `dsbs train` first")
    return max(students, key=lambda student: student.valid_accuracy).path


def prediction_file(run: Path, system: str) -> Path:
    return run / "eval" / "predictions" / f"{system}.jsonl"


def loader(student: TrainedStudent) -> Loader:
    """Loads the student when it is first called, and once: what asks it may find that all is there already."""
    return cache(lambda: Student.load(student.path))


def predict_student(
    recipe: Recipe,
    student: TrainedStudent,
    rows: Sequence[Example],
    run: Path,
    progress: Progress,
    load: Loader | None = None,
) -> Path:
    """The student's prediction file: kept where it fits the student and the rows, else made (and the old one set aside).

    ``load`` is the student's `loader` where others use the model too.
    """
    path = prediction_file(run, student.name)
    card = read_card(student.path)
    explain = recipe.eval.rationales and card.explains
    data = canonical_json([[row.id, row.input] for row in rows])
    # one that reasons first writes the same either way
    decodes = ["rationales"] if explain and not card.reasons_first else []
    made_by = digest(student.fingerprint, data, str(recipe.eval.max_label_tokens), *decodes)
    if maker_of(path) == made_by or _taken_back(path, made_by):
        return path
    progress.say(f"predict {recipe.eval.split}: {student.name}")
    model = load() if load is not None else Student.load(student.path)
    size = recipe.eval.batch_size
    inputs, most = [row.input for row in rows], recipe.eval.max_label_tokens
    few = inputs[: min(size, 8)]
    model.predict(
        few, batch_size=size, max_label_tokens=most, canonical=True
    )  # the first batch pays for start-up
    answers = model.predict(
        inputs, rationale=explain, batch_size=size, max_label_tokens=most, canonical=True
    )
    prompt = digest(canonical_json(card.prefixes), canonical_json(card.starts))
    write_jsonl(
        path,
        (
            Prediction(
                id=row.id,
                input=row.input,
                gold=row.label,
                raw=answer.raw,
                prediction=answer.label,
                correct=is_correct(model.task, answer.label, row),
                probability=answer.probability,
                truncated=answer.truncated,
                rationale=answer.rationale,
                rationale_truncated=answer.rationale_truncated,
                latency_ms=round(answer.latency_ms, 4),
                made_by=made_by,
                model=student.fingerprint,
                prompt=prompt,
            ).model_dump_json(by_alias=True)
            for row, answer in zip(rows, answers, strict=True)
        ),
    )
    return path


def _taken_back(path: Path, made_by: str) -> bool:
    """Set aside the prediction file that no longer fits, and take back the one that fits again, if there is one."""
    if path.is_file():
        RunFolder.set_aside(path, maker_of(path))
    return RunFolder.take_back(path, made_by, maker_of)


def student_predictions(run: Path, student: TrainedStudent) -> dict[str, Prediction]:
    """The student's predictions as they lie in the run. Raises UserError where there are none, or another student's."""
    path = prediction_file(run, student.name)
    again = "run dsbs eval without --score-only"
    if not path.is_file():
        raise UserError(f"{path} does not exist", hint=again)
    found = read_predictions(path)
    if any(prediction.model not in (None, student.fingerprint) for prediction in found.values()):
        raise UserError(
            f"{path} is of an earlier student of that name, which was trained in another way",
            hint=again,
        )
    return found


def is_correct(task: Task, label: str | None, row: Example) -> bool | None:
    """None where the row has no gold label."""
    return None if row.label is None else label is not None and task.correct(label, row.label)


def predict_teacher(
    recipe: Recipe, task: Task, rows: Sequence[Example], run: Path, *, needed: bool
) -> Path | None:
    """The teacher's prediction file from its annotations of the split; None where it was not asked about that split.

    Where it is ``needed`` (a student learned from it) and was to be asked, missing annotations are a mistake.
    """
    if recipe.eval.split not in recipe.annotate.splits or recipe.teacher.kind == "human":
        return None
    if not annotation_file(run, recipe.eval.split).is_file() and not needed:
        return None
    annotations = RunFolder(run).load_annotations(
        recipe.eval.split, source_fingerprint(recipe, task)
    )
    missing = [row.id for row in rows if row.id not in annotations]
    if missing:
        raise UserError(
            f"{len(missing)} {recipe.eval.split} rows have no annotation (first: {missing[0]})",
            hint="the data changed since: run `dsbs annotate` again",
        )

    prompt = read_manifest(annotation_file(run, recipe.eval.split).parent).get("prompt")
    prompt_hash = None if prompt is None else digest(canonical_json(prompt))

    def line(row: Example) -> str:
        annotation = annotations[row.id]
        own, teacher = annotation.own_label, annotation.teacher
        return Prediction(
            id=row.id,
            input=row.input,
            gold=row.label,
            raw=own or "",
            prediction=own,  # what it said without a hint
            correct=is_correct(task, own, row),
            probability=_probability(annotation, task),
            truncated=_truncated(annotation),
            rationale=None if annotation.provenance == "hinted" else annotation.rationale,
            made_by=f"teacher:{teacher.kind}:{teacher.model}",
            model=f"{teacher.kind}:{teacher.model}" if teacher.model else teacher.kind,
            prompt=prompt_hash,
        ).model_dump_json(by_alias=True)

    path = prediction_file(run, TEACHER)
    write_jsonl(path, (line(row) for row in rows))
    return path


def _probability(annotation: Annotation, task: Task) -> float | None:
    """Of the teacher's own label: by its tokens where they are known, else its share of several samples.

    Of an ensemble it is the members' weighted share: the log-probabilities are of those alone that voted for the label.
    """
    label, own = annotation.own_label, _own(annotation)
    if label is None:
        return None
    logprob, share = annotation.label_logprob, annotation.vote_share
    if annotation.provenance == "hinted":  # those two are of the label that was given away
        read = [sample for sample in own if sample.label is not None]
        votes = [sample for sample in read if task.correct(str(sample.label), label)]
        logs = [sample.label_logprob for sample in votes if sample.label_logprob is not None]
        logprob, share = (statistics.fmean(logs) if logs else None), len(votes) / len(read)
    if annotation.teacher.kind == "ensemble":
        return share
    if logprob is not None:
        return min(1.0, math.exp(logprob))
    return share if len(own) > 1 else None


def _truncated(annotation: Annotation) -> bool | None:
    """Whether the budget ended before a label was said; None where nothing was asked."""
    own = _own(annotation)
    return (
        annotation.own_label is None and own[0].reason in ("truncated", "spent-on-reasoning")
        if own
        else None
    )


def mark_anew(run: Path, system: str, scored: Scored, task: Task) -> None:
    """Bring a prediction file's ``gold``, ``prediction`` and ``correct`` up to today's data and reader, where they differ.

    What the model wrote stays as it is.
    """
    changed = {}
    for row, label, there in zip(scored.rows, scored.labels, scored.predictions, strict=True):
        marks = {"gold": row.label, "prediction": label, "correct": is_correct(task, label, row)}
        if marks != {"gold": there.gold, "prediction": there.prediction, "correct": there.correct}:
            changed[row.id] = there.model_copy(update=marks)
    if changed:
        path = prediction_file(run, system)
        found = read_predictions(path) | changed  # rows without a gold label stay
        write_jsonl(path, (one.model_dump_json(by_alias=True) for one in found.values()))


def read_predictions(path: Path) -> dict[str, Prediction]:
    """A prediction file by id. Raises UserError with file and line."""
    found: dict[str, Prediction] = {}
    for number, row in read_jsonl(path):
        try:
            prediction = Prediction.model_validate(row)
        except ValidationError as error:
            raise UserError(
                f"{path}:{number}: not a prediction ({error.errors()[0]['msg']})",
                hint="remove the file",
            ) from None
        if prediction.id in found:
            raise UserError(
                f"{path}:{number}: id {prediction.id!r} occurs twice",
                hint="remove the file and run again",
            )
        found[prediction.id] = prediction
    return found


def _own(annotation: Annotation) -> list[Sample]:
    return [sample for sample in annotation.samples if not sample.hinted]


def maker_of(path: Path) -> str | None:
    """What a prediction file says in its first line that it was made by; None where it cannot be read."""
    try:
        first: dict[str, Any] = next(iter(read_jsonl(path)))[1]
    except (StopIteration, UserError, OSError):
        return None
    value = first.get("made_by")
    return value if isinstance(value, str) else None
