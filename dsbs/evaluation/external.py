"""Systems from outside: files of {id, prediction} that stand in the comparison without any model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.evaluation.predict import is_correct, maker_of, prediction_file, trained_students
from dsbs.files import find_file, read_jsonl, write_jsonl
from dsbs.records.rows import Example, Prediction, Unread
from dsbs.tasks.base import Task

_MOST_MS = 1e12  # Python reads whole numbers of any length, and no float holds those
_MARK = "outside:"  # what begins made_by in files that were written here


def take_outside(recipe: Recipe, task: Task, rows: Sequence[Example], run: Path) -> list[str]:
    """Write ``eval/predictions/<name>.jsonl`` for each of the recipe's ``eval.predictions``, anew every time; their names.

    Raises UserError for the first mistake, naming the file and its line.
    """
    students = trained_students(run)
    taken = {student.name for student in students} | {student.system for student in students}
    for name, given in recipe.eval.predictions.items():
        path = prediction_file(run, name)
        theirs = path.is_file() and not (maker_of(path) or "").startswith(_MARK)
        if name in taken or theirs:
            what = f"{path} is" if theirs else "that name is"
            raise UserError(
                f"eval.predictions.{name}: {what} a student's of this run",
                hint="choose another name",
            )
        source = find_file(
            given,
            what=f"eval.predictions.{name}: the file",
            hint="paths are read from here or beside the recipe",
            beside=recipe.folder,
        )
        write_jsonl(
            path, [line.model_dump_json(by_alias=True) for line in read_outside(source, task, rows)]
        )
    return list(recipe.eval.predictions)


def read_outside(path: Path, task: Task, rows: Sequence[Example]) -> list[Prediction]:
    """A file's prediction for each of ``rows``, in their order; what it says of other rows is left out. Raises UserError."""
    wanted = {row.id: row for row in rows}
    try:
        with path.open("rb") as file:
            source = _MARK + hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror})", hint="make it readable"
        ) from None
    found: dict[str, Prediction] = {}
    lines: dict[str, int] = {}
    for number, given in read_jsonl(path):
        line = _Line(f"{path}:{number}", given)
        row_id = line.id()
        if row_id in lines:
            raise UserError(
                f"{line.where}: id {row_id!r} stands in line {lines[row_id]} already",
                hint="give each row one prediction",
            )
        lines[row_id] = number
        raw, probability = line.prediction(), line.number("probability", most=1.0)
        rationale, latency_ms = line.text("rationale"), line.number("latency_ms", most=_MOST_MS)
        row = wanted.get(row_id)
        if row is None:
            continue
        label = None if raw is None else task.read_label(raw, row.input)
        label = None if isinstance(label, Unread) else label
        found[row_id] = Prediction(
            id=row_id,
            input=row.input,
            gold=row.label,
            raw=raw or "",
            prediction=label,
            correct=is_correct(task, label, row),
            probability=probability,
            rationale=rationale,
            latency_ms=latency_ms,
            made_by=source,
        )
    if not lines:
        raise UserError(
            f"{path} is empty", hint='each line is an object such as {"id": "1", "prediction": "…"}'
        )
    missing = [row_id for row_id in wanted if row_id not in found]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of the split's {len(wanted)} rows (first: {missing[0]!r})",
            hint='give a line for each; {"id": …, "prediction": null} is one that the system had no answer to',
        )
    return [found[row.id] for row in rows]


class _Line:
    """One object of a file; each method reads a key and raises UserError for a value of another type."""

    def __init__(self, where: str, given: dict[str, Any]) -> None:
        self.where, self._given = where, given

    def id(self) -> str:
        value = self._needed("id")
        if not isinstance(value, str | int) or isinstance(value, bool) or not str(value).strip():
            raise self._wrong("id", "text, or a whole number")
        return str(value).strip()  # as the data's own ids are read

    def prediction(self) -> str | None:
        value = self._needed("prediction")
        if isinstance(value, str) or value is None:
            return value
        if not _is_number(value):
            raise self._wrong("prediction", "text, a number or null")
        return str(value)

    def text(self, key: str) -> str | None:
        value = self._given.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, "text or null")
        return value

    def number(self, key: str, *, most: float) -> float | None:
        value = self._given.get(key)
        if value is None:
            return None
        if not _is_number(value) or not 0 <= value <= most:
            raise self._wrong(key, f"a number from 0 to {most:g}, or null")
        return float(value)

    def _needed(self, key: str) -> Any:
        if key not in self._given:
            keys = ", ".join(map(repr, self._given)) or "none"
            raise UserError(
                f"{self.where}: no key {key!r} (keys: {keys})",
                hint="rename the key; each line needs id and prediction",
            )
        return self._given[key]

    def _wrong(self, key: str, wanted: str) -> UserError:
        return UserError(
            f"{self.where}: {key} is {self._given[key]!r:.80}", hint=f"{key} must be {wanted}"
        )


def _is_number(value: Any) -> bool:
    """JSON's own numbers; Python reads NaN and Infinity as well."""
    return not isinstance(value, bool) and (
        isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    )
