"""Prediction files: ``eval/predictions/<system>.jsonl``, a line for each row of the split.

A student's file is kept while it fits the student, the rows and the decoding; otherwise it is set
aside and made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from dsbs.config import EvalSection, Recipe, base_of
from dsbs.config.registry import METHODS, entry
from dsbs.errors import UserError
from dsbs.evaluation.metrics import Scored
from dsbs.files import canonical_json, digest, read_jsonl, write_jsonl
from dsbs.progress import Progress
from dsbs.records import Example, Prediction, TrainedStudent
from dsbs.run_folder import RunFolder
from dsbs.students.calibration import Calibration, read_calibration, short_share
from dsbs.students.card import CARD, StudentCard, read_card
from dsbs.students.student import Student
from dsbs.tasks import Task

_WARM_UP_ROWS = 8
FLOOR_MARK = "floor-"  # the start of made_by in a floor's file

StudentLoader = Callable[[], Student]


def loader(student: TrainedStudent) -> StudentLoader:
    """A function that loads the student when it is first called, and only then."""
    return cache(lambda: Student.load(student.path))


def best_student(
    recipe: Recipe, out: str | Path | None = None, *, needs_rationales: bool = False
) -> str:
    """The folder of the run's student with the highest validation accuracy, of any of the recipe's
    students.

    With ``needs_rationales`` only methods that learn rationales count. Raises UserError if there is
    no such student.
    """
    run = RunFolder.of(recipe, out)
    students = [student for student in run.students() if student.student in recipe.students]
    if needs_rationales:
        students = [
            student
            for student in students
            if entry(METHODS, base_of(student.method)).needs_rationales
        ]
    if not students:
        missing = "student with rationales" if needs_rationales else "finished student"
        raise UserError(f"{run.stage('train')} has no {missing}", hint="run `dsbs train` first")
    return max(students, key=lambda student: student.valid_accuracy).path


# --- predicting


def predict_student(
    recipe: Recipe,
    student: TrainedStudent,
    rows: Sequence[Example],
    run: RunFolder,
    progress: Progress,
    load: StudentLoader | None = None,
    *,
    kind: Literal["calibration", "review"] | None = None,
) -> Path:
    """Make the student's prediction file unless it is there, and return its path.

    ``load`` is the student's `loader`, if the model is used elsewhere too. ``kind``: the rows are
    a cascade's calibration rows, or rows that people review. None: those of the evaluated split.
    """
    path = run.predictions(student.name) if kind is None else rows_file(run, student, kind)
    purpose = recipe.eval.split if kind is None else f"{kind} rows"
    card = read_card(student.path)
    options = recipe.eval
    explain = options.rationales and card.explains
    scores_labels = options.score_labels and card.writes_label_alone
    has_distribution = _has_distribution(card, options)
    calibration = read_calibration(student.path) if has_distribution else None
    data = canonical_json([[row.id, row.input] for row in rows])
    probabilities = _probabilities(card, options, calibration)
    # A student that reasons first writes its rationale in any case.
    writes_more = explain and not card.reasons_first
    decoding = [*(["rationales"] if writes_more else []), *probabilities]
    fingerprint = digest(student.fingerprint, data, str(options.max_label_tokens), *decoding)
    if fits_or_restore(path, fingerprint):
        return path
    progress.say(f"predict {purpose}: {student.name}")
    if calibration is None and has_distribution:
        progress.say(
            f"{student.name} is not calibrated: its probabilities are of temperature 1 "
            "(`dsbs train` with this recipe calibrates it)"
        )
    model = Student.load(student.path) if load is None else load()
    inputs = [row.input for row in rows]
    # The first batch includes the start-up of the runtime; it is not part of any row's latency.
    model.predict(
        inputs[: min(options.batch_size, _WARM_UP_ROWS)],
        batch_size=options.batch_size,
        max_label_tokens=options.max_label_tokens,
        canonical=True,
    )
    answers = model.predict(
        inputs,
        rationale=explain,
        batch_size=options.batch_size,
        max_label_tokens=options.max_label_tokens,
        canonical=True,
        score_labels=scores_labels,
    )
    prompt = digest(canonical_json(card.prefixes), canonical_json(card.starts))
    predictions = (
        Prediction(
            id=row.id,
            input=row.input,
            gold=row.label,
            raw=answer.raw,
            prediction=answer.label,
            correct=is_correct(model.task, answer.label, row),
            probability=answer.probability,
            distribution=rounded(answer.distribution),
            field_probabilities=rounded(answer.field_probabilities),
            truncated=answer.truncated,
            rationale=answer.rationale,
            rationale_truncated=answer.rationale_truncated,
            latency_ms=round(answer.latency_ms, 4),
            made_by=fingerprint,
            model=student.fingerprint,
            prompt=prompt,
            calibration=digest(*probabilities),
        )
        for row, answer in zip(rows, answers, strict=True)
    )
    write_jsonl(path, (prediction.model_dump_json(by_alias=True) for prediction in predictions))
    return path


def _has_distribution(card: StudentCard, options: EvalSection) -> bool:
    if card.head == "labels":
        return True
    return card.writes_label_alone and (options.score_labels or card.task.fields is not None)


def _probabilities(
    card: StudentCard, options: EvalSection, calibration: Calibration | None
) -> list[str]:
    """What decides a student's probabilities beside its weights and its inputs."""
    settings = []
    if options.score_labels and card.writes_label_alone:
        settings.append("score-labels")
    if calibration is not None:
        settings.append(f"temperature={calibration.temperature:g}")
        if calibration.label_thresholds is not None:
            settings.append(calibration.label_thresholds.model_dump_json())
    return settings


def rows_file(
    run: RunFolder, student: TrainedStudent, kind: Literal["calibration", "review"]
) -> Path:
    """The student's prediction file of rows of another kind than those of the evaluated split."""
    return run.predictions(f"{kind}/{student.name}")


def rounded(distribution: Mapping[str, float] | None) -> dict[str, float] | None:
    """A distribution as files have it: with six significant digits."""
    if distribution is None:
        return None
    return {label: short_share(share) for label, share in distribution.items()}


def fits_or_restore(path: Path, fingerprint: str) -> bool:
    """Whether a prediction file fits; else it is set aside, and one that fits is restored."""
    if made_by(path) == fingerprint:
        return True
    if path.is_file():
        RunFolder.set_aside(path, made_by(path))
    return RunFolder.restore(path, fingerprint, made_by)


def is_correct(task: Task, label: str | None, row: Example) -> bool | None:
    """Whether a label is right; None if the row has no gold label."""
    if row.label is None:
        return None
    return label is not None and task.correct(label, row.label)


# --- reading and updating


def student_predictions(
    recipe: Recipe, path: Path, student: TrainedStudent
) -> dict[str, Prediction]:
    """The predictions of a student in a file, by row id.

    Raises UserError if the file is missing, or was made by another student of that name or with
    another calibration.
    """
    hint = "run dsbs eval without --score-only"
    if not path.is_file():
        raise UserError(f"{path} does not exist", hint=hint)
    predictions = read_predictions(path)
    models = {prediction.model for prediction in predictions.values()}
    if models - {None, student.fingerprint}:
        raise UserError(
            f"{path} was made by an earlier student of that name, trained with other settings",
            hint=hint,
        )
    if not (Path(student.path) / CARD).is_file():
        return predictions  # the run was copied without its students
    card = read_card(student.path)
    fits = read_calibration(student.path) if _has_distribution(card, recipe.eval) else None
    now = digest(*_probabilities(card, recipe.eval, fits))
    if {prediction.calibration for prediction in predictions.values()} - {None, now}:
        raise UserError(
            f"{path} has probabilities of another calibration or eval.score_labels than now",
            hint=hint,
        )
    return predictions


def read_predictions(path: Path) -> dict[str, Prediction]:
    """A prediction file by row id. Raises UserError with file and line."""
    predictions: dict[str, Prediction] = {}
    for number, row in read_jsonl(path):
        try:
            prediction = Prediction.model_validate(row)
        except ValidationError as error:
            raise UserError(
                f"{path}:{number}: not a prediction ({error.errors()[0]['msg']})",
                hint="remove the file",
            ) from None
        if prediction.id in predictions:
            raise UserError(
                f"{path}:{number}: id {prediction.id!r} occurs twice",
                hint="remove the file and run again",
            )
        predictions[prediction.id] = prediction
    return predictions


def made_by(path: Path) -> str | None:
    """The ``made_by`` of a prediction file's first line; None if it cannot be read."""
    try:
        _, first = next(iter(read_jsonl(path)))
    except (StopIteration, UserError, OSError):
        return None
    value = first.get("made_by")
    return value if isinstance(value, str) else None


def update_marks(run: RunFolder, system: str, scored: Scored, task: Task) -> None:
    """Update ``gold``, ``prediction`` and ``correct`` in a prediction file to ``scored``.

    The data's gold labels or the task's reader may have changed; raw outputs stay as they are.
    """
    changed = {}
    for row, label, prediction in zip(scored.rows, scored.labels, scored.predictions, strict=True):
        marks = {"gold": row.label, "prediction": label, "correct": is_correct(task, label, row)}
        if marks != prediction.model_dump(include=set(marks)):
            changed[row.id] = prediction.model_copy(update=marks)
    if changed:
        path = run.predictions(system)
        predictions = read_predictions(path) | changed  # rows without a gold label stay
        lines = (prediction.model_dump_json(by_alias=True) for prediction in predictions.values())
        write_jsonl(path, lines)
