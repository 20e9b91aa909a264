"""External predictions: files of {id, prediction} that are compared like any other system."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.evaluation.predictions import is_correct, made_by
from dsbs.files import find_file, read_jsonl, write_jsonl
from dsbs.formatting import count
from dsbs.records.rows import Example, Prediction, Unread
from dsbs.run_folder import RunFolder
from dsbs.tasks.base import Task

_MAX_MS = 1e12  # JSON integers can be too large for a float
# The start of made_by in the files that are written here, as in those of the first version.
_MARK = "outside:"


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
        if path.is_file() and not (made_by(path) or "").startswith(_MARK):
            raise _name_taken(name, f"{path} is")
        source = find_file(
            given_path,
            what=f"eval.predictions.{name}: the file",
            hint="paths are relative to the working directory or to the recipe's",
            beside=recipe.folder,
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
    for number, fields in read_jsonl(path):
        line = _Line(f"{path}:{number}", fields)
        row_id = line.id()
        if row_id in line_numbers:
            raise UserError(
                f"{line.position}: id {row_id!r} is already in line {line_numbers[row_id]}",
                hint="give each row one prediction",
            )
        line_numbers[row_id] = number
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
        raise UserError(
            f"{path} lacks {len(missing)} of the split's {count(len(rows_by_id), 'row')} "
            f"(first: {missing[0]!r})",
            hint='add a line for each; {"id": …, "prediction": null} means that the system '
            "gave no answer",
        )
    return [predictions[row.id] for row in rows]


def _read_label(task: Task, raw: str | None, row: Example) -> str | None:
    if raw is None:
        return None
    label = task.read_label(raw, row.input)
    return None if isinstance(label, Unread) else label


class _Line:
    """One object of a file. Each method reads a key and raises UserError for a wrong value."""

    def __init__(self, position: str, fields: Mapping[str, Any]) -> None:
        self.position = position
        self._fields = fields

    def id(self) -> str:
        value = self._required("id")
        is_id = isinstance(value, str | int) and not isinstance(value, bool)
        if not is_id or not str(value).strip():
            raise self._wrong("id", "text or an integer")
        return str(value).strip()  # as ids of the data are read

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
