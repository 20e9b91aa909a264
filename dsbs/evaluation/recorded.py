"""Recorded predictions: the teacher's, from its annotations, and external ones, from files."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.evaluation.predictions import FLOOR_MARK, is_correct, made_by
from dsbs.files import find_file, write_jsonl
from dsbs.formatting import count
from dsbs.prompting import Prompt, source_fingerprint
from dsbs.records import Annotation, Example, Prediction, Sample, Unreadable
from dsbs.run_folder import RunFolder
from dsbs.tasks import Task
from dsbs.tasks.data import id_text, numeric_id, respelled_ids
from dsbs.tasks.tables import format_of, read_table

TEACHER = "teacher"  # the system's name
_TOLERATED = 0.01  # share of rows without a reply
_MAX_MS = 1e12  # JSON integers can be too large for a float
# The start of made_by in the files that are written here, as in those of the first version.
_MARK = "outside:"


def predict_teacher(
    recipe: Recipe, task: Task, rows: Sequence[Example], run: RunFolder, *, required: bool
) -> bool:
    """Write the teacher's prediction file; returns False if it did not annotate the split.

    With ``required`` (a student learned from the teacher), missing annotations raise UserError if
    ``annotate.splits`` names the split.
    """
    split = recipe.eval.split
    if split not in recipe.annotate.splits or recipe.teacher.kind == "human":
        return False
    if not run.annotations(split).is_file() and not required:
        return False
    annotations = run.load_annotations(split, source_fingerprint(recipe, task))
    missing = [row.id for row in rows if row.id not in annotations]
    if missing:
        raise UserError(
            f"{count(len(missing), f'{split} row')} without an annotation (first: {missing[0]})",
            hint="the data has changed since: run `dsbs annotate` again",
        )
    run.check_inputs(annotations, rows, split)
    check_replies([annotations[row.id] for row in rows], f"{split} row")
    prompt = run.manifest("annotate").get("prompt")
    prompt_hash = None
    if prompt is not None:
        prompt_hash = Prompt.model_validate(prompt).hash
    predictions = (_prediction(annotations[row.id], row, task, prompt_hash) for row in rows)
    write_jsonl(
        run.predictions(TEACHER),
        (prediction.model_dump_json(by_alias=True) for prediction in predictions),
    )
    return True


def check_replies(annotations: Sequence[Annotation], noun: str) -> None:
    """Raises UserError where rows have no reply of the teacher: they would count as its mistakes.

    Up to 1% may lack one: an endpoint may fail on a row whenever it is asked.
    """
    missing = [annotation.id for annotation in annotations if not annotation.has_reply]
    if len(missing) <= _TOLERATED * len(annotations):
        return
    raise UserError(
        f"{len(missing):,} of {count(len(annotations), noun)} have no reply of the teacher (first: "
        f"{missing[0]}), so its accuracy is not known",
        hint="run `dsbs annotate` again: it asks for the missing replies alone. Recorded replies "
        "cannot be asked for: leave those rows out of the data, or the split out of "
        "annotate.splits",
    )


def _prediction(
    annotation: Annotation, row: Example, task: Task, prompt_hash: str | None
) -> Prediction:
    """The label that the teacher gave without a hint, and its rationale for that label."""
    label = annotation.own_label
    teacher = annotation.teacher
    is_hinted = annotation.provenance == "hinted"
    return Prediction(
        id=row.id,
        input=row.input,
        gold=row.label,
        raw=label or "",
        prediction=label,
        correct=is_correct(task, label, row),
        probability=_probability(annotation, task),
        truncated=_truncated(annotation),
        rationale=None if is_hinted else annotation.rationale,
        made_by=f"teacher:{teacher.kind}:{teacher.model}",
        model=f"{teacher.kind}:{teacher.model}" if teacher.model else teacher.kind,
        prompt=prompt_hash,
    )


def _probability(annotation: Annotation, task: Task) -> float | None:
    """The probability of the teacher's own label: from its token log-probabilities if known, else
    its share of several samples.

    An ensemble's is the members' weighted share: log-probabilities are known only of the members
    that voted for the label.
    """
    label = annotation.own_label
    samples = _unhinted(annotation)
    if label is None:
        return None
    logprob = annotation.label_logprob
    share = annotation.vote_share
    if annotation.provenance == "hinted":  # logprob and share are of the label given in the hint
        read = [sample for sample in samples if sample.label is not None]
        votes = [sample for sample in read if task.correct(str(sample.label), label)]
        logprobs = [sample.label_logprob for sample in votes if sample.label_logprob is not None]
        logprob = statistics.fmean(logprobs) if logprobs else None
        share = len(votes) / len(read)
    if annotation.teacher.kind == "ensemble":
        return share
    if logprob is not None:
        return min(1.0, math.exp(logprob))
    return share if len(samples) > 1 else None


def _truncated(annotation: Annotation) -> bool | None:
    """Whether the token limit ended the output before a label; None if nothing was requested."""
    samples = _unhinted(annotation)
    if not samples:
        return None
    cut = samples[0].reason in ("truncated", "spent-on-reasoning")
    return annotation.own_label is None and cut


def _unhinted(annotation: Annotation) -> list[Sample]:
    return [sample for sample in annotation.samples if not sample.hinted]


# --- external systems


def add_external(recipe: Recipe, task: Task, rows: Sequence[Example], run: RunFolder) -> list[str]:
    """Write the prediction file of each of ``eval.predictions``, every time; returns their names.

    Raises UserError for the first mistake, with file and line.
    """
    students = run.students()
    student_names = {student.name for student in students}
    student_names |= {student.system for student in students}
    for name, given_path in recipe.eval.predictions.items():
        path = run.predictions(name)
        if name in student_names:
            raise _name_taken(name, "that name is")
        mark = made_by(path) or "" if path.is_file() else _MARK
        if mark.startswith(FLOOR_MARK):
            RunFolder.set_aside(path, mark)
        elif not mark.startswith(_MARK):
            raise _name_taken(name, f"{path} is")
        source = find_file(
            given_path,
            what=f"eval.predictions.{name}: the file",
            hint="paths are relative to the working directory or to the recipe's",
            folder=recipe.folder,
        )
        predictions = read_external(source, task, rows)
        write_jsonl(path, [prediction.model_dump_json(by_alias=True) for prediction in predictions])
    return list(recipe.eval.predictions)


def _name_taken(name: str, subject: str) -> UserError:
    return UserError(
        f"eval.predictions.{name}: {subject} a student's of this run", hint="choose another name"
    )


def read_external(path: Path, task: Task, rows: Sequence[Example]) -> list[Prediction]:
    """A file's prediction for each of ``rows``, in their order; other ids are ignored.

    Raises UserError for a file that cannot be read, with the line of a mistake in it.
    """
    rows_by_id = {row.id: row for row in rows}
    try:
        with path.open("rb") as file:
            mark = _MARK + hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror})", hint="make it readable"
        ) from None
    predictions: dict[str, Prediction] = {}
    line_numbers: dict[str, int] = {}
    is_text = format_of(path) in ("csv", "tsv")
    for where, fields in read_table(path):
        line = _Line(where, _typed(fields) if is_text else fields)
        row_id = line.id()
        if row_id in line_numbers:
            raise UserError(
                f"{line.position}: id {row_id!r} is already in line {line_numbers[row_id]}",
                hint="give each row one prediction",
            )
        line_numbers[row_id] = int(where.rpartition(":")[2])
        raw = line.prediction()
        probability = line.number("probability", maximum=1.0)
        rationale = line.text("rationale")
        latency_ms = line.number("latency_ms", maximum=_MAX_MS)
        row = rows_by_id.get(row_id)
        if row is None:
            continue
        label = _read_label(task, raw, row)
        predictions[row_id] = Prediction(
            id=row_id,
            input=row.input,
            gold=row.label,
            raw=raw or "",
            prediction=label,
            correct=is_correct(task, label, row),
            probability=probability,
            rationale=rationale,
            latency_ms=latency_ms,
            made_by=mark,
        )
    if not line_numbers:
        raise UserError(
            f"{path} is empty", hint='each line is an object such as {"id": "1", "prediction": "…"}'
        )
    missing = [row_id for row_id in rows_by_id if row_id not in predictions]
    if missing:
        by_number = {numeric_id(row_id): row_id for row_id in line_numbers}
        for row_id in missing:
            if numeric_id(row_id) in by_number:
                raise respelled_ids(path, row_id, by_number[numeric_id(row_id)])
        raise UserError(
            f"{path} lacks {len(missing)} of the split's {count(len(rows_by_id), 'row')} "
            f"(first: {missing[0]!r})",
            hint='add a line for each; {"id": …, "prediction": null} means that the system '
            "gave no answer",
        )
    return [predictions[row.id] for row in rows]


def _typed(cells: Mapping[str, Any]) -> dict[str, Any]:
    """A row of text cells with numbers where numbers belong, and None for empty cells."""
    typed: dict[str, Any] = {}
    for key, cell in cells.items():
        typed[key] = cell if cell.strip() or key == "id" else None
        if key in ("probability", "latency_ms") and typed[key] is not None:
            with suppress(ValueError):
                typed[key] = float(cell)
    return typed


def _read_label(task: Task, raw: str | None, row: Example) -> str | None:
    if raw is None:
        return None
    label = task.read_label(raw, row.input)
    return None if isinstance(label, Unreadable) else label


class _Line:
    """One object of a file. Each method reads a key and raises UserError for a wrong value."""

    def __init__(self, position: str, fields: Mapping[str, Any]) -> None:
        self.position = position
        self._fields = fields

    def id(self) -> str:
        value = self._required("id")
        row_id = id_text(value, self.position)  # as ids of the data are read
        is_fraction = isinstance(value, float) and not value.is_integer()
        if row_id is None or is_fraction or isinstance(value, bool):
            raise self._wrong("id", "text or an integer")
        return row_id

    def prediction(self) -> str | None:
        value = self._required("prediction")
        if isinstance(value, str) or value is None:
            return value
        if not _is_number(value):
            raise self._wrong("prediction", "text, a number or null")
        return str(value)

    def text(self, key: str) -> str | None:
        value = self._fields.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, "text or null")
        return value

    def number(self, key: str, *, maximum: float) -> float | None:
        value = self._fields.get(key)
        if value is None:
            return None
        if not _is_number(value) or not 0 <= value <= maximum:
            raise self._wrong(key, f"a number from 0 to {maximum:g}, or null")
        return float(value)

    def _required(self, key: str) -> Any:
        if key not in self._fields:
            keys = ", ".join(map(repr, self._fields)) or "none"
            raise UserError(
                f"{self.position}: no key {key!r} (keys: {keys})",
                hint="rename the key; each line needs id and prediction",
            )
        return self._fields[key]

    def _wrong(self, key: str, expected: str) -> UserError:
        return UserError(
            f"{self.position}: {key} is {self._fields[key]!r:.80}", hint=f"{key} must be {expected}"
        )


def _is_number(value: object) -> bool:
    """Whether a value is a JSON number; Python's reader also accepts NaN and Infinity."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)
