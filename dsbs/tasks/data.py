"""Data: rows from files or a hub as Examples, with checks, ids and held-out splits. Rows are
streamed.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsbs.config import LabelSource, Recipe
from dsbs.errors import UserError
from dsbs.files import canonical_json, digest
from dsbs.records import Annotation, Example
from dsbs.tasks import MISSING_WORDS, Fields, Task, cell_text, column_of, missing_column
from dsbs.tasks.marks import fold
from dsbs.tasks.tables import format_of, source_rows

_MAX_PROBLEMS = 5  # in one message
_CONTENT_ID = re.compile(r"row-[0-9a-f]{16}")  # made from a row's content


def split_source(recipe: Recipe, split: str) -> str:
    """The path or hub address of a split's rows; a held-out split's is train's."""
    data = recipe.task.data
    sources = {
        "train": data.train,
        "valid": data.valid or data.train,
        "test": data.test or data.train,
    }
    return sources[split]


def annotated_split(recipe: Recipe, split: str) -> str:
    """The split whose annotations and reviews have the rows of ``split``: held-out validation rows
    are annotated with the train rows.
    """
    return "train" if split == "valid" and recipe.task.data.valid is None else split


def stream(recipe: Recipe, task: Task, split: str) -> Iterator[Example]:
    """Yield the Examples of ``train``, ``valid`` or ``test`` in the order of the file.

    A test split that the data lacks is held out of the train file. So is a valid split, but
    ``train`` still yields its rows: they are annotated like the rest (see ``is_held_out``). Served
    rows follow the train file's, beyond ``task.limit``. Raises UserError for unusable rows, several
    at a time.
    """
    data = recipe.task.data
    rows = _examples(recipe, task, split_source(recipe, split), split)
    is_from_train = split == "train" or (split == "valid" and data.valid is None)
    if is_from_train and data.test is None:
        rows = (row for row in rows if _side(row, "test") >= data.test_fraction)
    if split == "test" and data.test is None:
        rows = (row for row in rows if _side(row, "test") < data.test_fraction)
    if split == "valid" and data.valid is None:
        rows = (row for row in rows if is_held_out(recipe, row))
    rows = itertools.islice(rows, recipe.task.limit)
    if split == "train" and data.served is not None:
        served = _examples(recipe, task, data.served, split)
        rows = itertools.chain(rows, (replace(row, is_served=True) for row in served))
    return rows


def load(recipe: Recipe, task: Task, split: str) -> list[Example]:
    """All rows of a split. Raises UserError for a split without rows."""
    rows = list(stream(recipe, task, split))
    if not rows:
        raise UserError(
            f"the {split} split of {split_source(recipe, split)} has no rows",
            hint="check the file; a split that is held out needs a few dozen rows to hold any",
        )
    return rows


def is_held_out(recipe: Recipe, row: Example) -> bool:
    """Whether a train row is held out for validation, because the data has no validation split."""
    data = recipe.task.data
    if row.is_served or data.valid is not None:
        return False
    return _side(row, "valid") < data.valid_fraction


def _side(row: Example, purpose: str) -> float:
    """The position that decides a row's split: of a copy, the position of the row it repeats."""
    return position(row.copy_of or row.id, purpose)


def position(row_id: str, purpose: str) -> float:
    """A row's position in [0, 1) by a hash of its id: the same in every run, whatever else is in
    the file.

    Copies of a row whose ids come from their content (``…~2``) have the same position.
    """
    if _CONTENT_ID.match(row_id):
        row_id = row_id.partition("~")[0]
    return int(hashlib.sha256(f"{purpose}:{row_id}".encode()).hexdigest()[:13], 16) / 16**13


def subset_order(ids: Sequence[str]) -> list[int]:
    """Indices of train rows by a hash of their ids: a subset is the first so many."""
    return sorted(range(len(ids)), key=lambda i: position(ids[i], "subset"))


def labels_by_row(
    rows: Sequence[Example], annotations: Callable[[], Mapping[str, Annotation]]
) -> tuple[LabelSource, dict[str, str]]:
    """Whose labels count rows per label, and the labels by id: the gold ones or, where no row has
    one, the teacher's of the accepted ``annotations``.
    """
    gold = {row.id: row.label for row in rows if row.label is not None}
    if gold:
        return "gold", gold
    by_id = annotations()
    accepted = (by_id[row.id] for row in rows if row.id in by_id and by_id[row.id].accepted)
    return "teacher", {row.id: row.own_label for row in accepted if row.own_label}


def validation_rows(rows: Iterable[Example], limit: int | None) -> list[Example]:
    """The first ``limit`` rows by a hash of their ids, in that order. None: all rows."""
    return sorted(rows, key=lambda row: position(row.id, "valid-limit"))[:limit]


@dataclass(frozen=True, slots=True)
class Survey:
    """A split's number of rows, and a hash of their content."""

    rows: int
    hash: str


def survey(rows: Iterable[Example]) -> Survey:
    """Count and hash rows in one pass."""
    state = hashlib.sha256()
    count = 0
    for row in rows:
        content = [row.id, row.input, row.label, row.rationale, row.completion]
        state.update(canonical_json(content).encode())
        state.update(b"\n")
        count += 1
    return Survey(count, state.hexdigest())


def comparable(fields: Fields) -> tuple[str, ...]:
    """The input's fields without differences in case, white space and Unicode's variants."""
    values = (
        value if isinstance(value, str) else canonical_json(value)
        for _, value in sorted(fields.items())
    )
    return tuple(
        fold(value if value.isascii() else unicodedata.normalize("NFKC", value)) for value in values
    )


def _examples(recipe: Recipe, task: Task, source: str, split: str) -> Iterator[Example]:
    # 64-bit hashes in place of ids and inputs, so that a million rows need little memory.
    counts: dict[int, int] = {}
    first_ids: dict[int, str] = {}
    data = recipe.task.data
    recorded_model = recipe.teacher.model if recipe.teacher.kind == "recorded" else None
    # Copies of a row must not be on both sides of a split that is held out.
    finds_copies = source == data.train and (data.valid is None or data.test is None)
    problems: list[UserError] = []
    is_empty = True
    unseen = _UnseenColumns(task, source)
    rows = source_rows(source, recipe.folder)
    while len(problems) < _MAX_PROBLEMS:
        try:
            where, row = next(rows)
            is_empty = False
            unseen.check(row, where)
            example = _example(task, row, where, recorded_model)
            key = _short_hash(example.id)
            counts[key] = counts.get(key, 0) + 1
            if counts[key] > 1:
                if not _CONTENT_ID.fullmatch(example.id):
                    raise _repeated_id(recipe, task, source, where, example.id)
                example = replace(example, id=f"{example.id}~{counts[key]}")
        except StopIteration:
            problems += unseen.problems()
            break
        except UserError as error:
            # A row that cannot be read ends the generator; one that cannot be used does not.
            problems.append(error)
            continue
        if finds_copies:
            first_id = first_ids.setdefault(_short_hash(*comparable(example.input)), example.id)
            if first_id != example.id:
                example = replace(example, copy_of=first_id)
        if not problems:
            yield example
    if problems:
        raise _all_problems(problems)
    if is_empty:
        state = "is empty"
        if format_of(source) in ("csv", "tsv"):
            state = "has no rows: a header alone, or nothing at all"
        raise UserError(
            f"{source} {state}", hint=f"add rows, or name another file in task.data.{split}"
        )


class _UnseenColumns:
    """The columns that ``task.columns`` names for parts of a label and that a file lacks.

    A mistake in such a name would make the part absent in all rows. In JSON lines, a row may lack a
    name that others have.
    """

    def __init__(self, task: Task, source: str) -> None:
        self._task = task
        self._source = source
        self._unseen = task.mapped_gold
        self._columns: dict[str, Any] = {}
        self._is_table = format_of(source) != "jsonl"
        self._needs_columns = False

    def check(self, row: dict[str, Any], where: str) -> None:
        """Raises UserError where a row of a table lacks a column."""
        task = self._task
        if not self._unseen or _inner(row) is not row:
            return
        if _cell(task, "label", task.label_columns, row, row, where) is not None:
            return  # all parts are in one cell
        self._needs_columns = True
        self._columns |= row
        self._unseen = {
            name: column
            for name, column in self._unseen.items()
            if column_of(row, (column,)) is None
        }
        if self._is_table:
            self._raise(where)

    def problems(self) -> list[UserError]:
        """The error of a file whose rows all lack a column, if there is one."""
        if self._is_table or not self._needs_columns:
            return []
        try:
            self._raise(self._source)
        except UserError as error:
            return [error]
        return []

    def _raise(self, where: str) -> None:
        for name, column in self._unseen.items():
            advice = "; where no row has a value, its cells may be empty"
            raise missing_column(where, name, self._columns, column, advice)


def _short_hash(*texts: str) -> int:
    state = hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(state.digest())


def _all_problems(errors: list[UserError]) -> UserError:
    hint = errors[-1].hint
    # A column that the file lacks is reported once, not for every row.
    reasons = [error.problem.partition(": ")[2] for error in errors]
    errors = [
        error
        for index, error in enumerate(errors)
        if not (reasons[index].startswith("no column") and reasons[index] in reasons[:index])
    ]
    if len(errors) == 1:
        return UserError(errors[0].problem, hint=hint)
    more = " (and perhaps more)" if len(errors) >= _MAX_PROBLEMS else ""
    lines = [f"{len(errors)} unusable rows{more}:", *(error.problem for error in errors)]
    return UserError("\n  ".join(lines), hint=hint)


def _repeated_id(recipe: Recipe, task: Task, source: str, where: str, row_id: str) -> UserError:
    """The error for an id's second row. The file is read again to find the first, as only hashes
    are held.
    """
    locations = (
        location
        for location, row in source_rows(source, recipe.folder)
        if _example(task, row, location).id == row_id
    )
    first_line = next(locations).rpartition(":")[2]
    return UserError(
        f"{where}: id {row_id!r} occurs twice (first in line {first_line})",
        hint="ids must be unique; without an id column they are made from each row's content",
    )


def input_of(task: Task, row: dict[str, Any], where: str) -> tuple[str | None, dict[str, Any]]:
    """The id (None: it has none) and the canonical fields of a row to predict. Raises UserError."""
    inner = _inner(row)
    names = (task.section.columns.get("id", "id"), *task.id_columns)
    column = column_of(row, names)
    row_id = None if column is None else id_text(row[column], where)
    if column is not None and row_id is None:
        raise UserError(
            f"{where}: the column {column!r} is empty", hint="give each row an id, or none"
        )
    return row_id, task.fields(inner, where)


def _inner(row: dict[str, Any]) -> dict[str, Any]:
    nested = row.get("input")
    return nested if isinstance(nested, dict) else row


def _example(
    task: Task, row: dict[str, Any], where: str, recorded_model: str | None = None
) -> Example:
    inner = _inner(row)
    fields = task.fields(inner, where)
    row_id = id_text(_cell(task, "id", task.id_columns, row, inner, where), where)
    label = _label(task, row, inner, where)
    if label is not None:
        label = task.gold(label, fields, where)
    rationale = cell_text(
        _cell(task, "rationale", task.rationale_columns, row, inner, where), "rationale", where
    )
    if rationale in MISSING_WORDS:
        rationale = None
    completion = _completion(row, recorded_model)
    return Example(
        id=row_id or f"row-{digest(canonical_json([fields, label]))[:16]}",
        input=fields,
        label=label,
        rationale=(rationale or "").strip() or None,
        completion=completion,
        line=int(where.rpartition(":")[2]),
    )


def _completion(row: dict[str, Any], model: str | None) -> str | None:
    """A row's recorded completion: of ``model`` where several teachers' are in ``teachers``."""
    teacher = row.get("teacher")
    teachers = row.get("teachers")
    if model is not None and isinstance(teachers, list):
        named = (entry for entry in teachers if isinstance(entry, dict))
        teacher = next((entry for entry in named if entry.get("model") == model), None)
    completion = teacher.get("completion") if isinstance(teacher, dict) else None
    return completion if isinstance(completion, str) else None


def _label(task: Task, row: dict[str, Any], inner: dict[str, Any], where: str) -> Any:
    """A row's label as ``Task.gold`` reads it; None: the row is unlabeled."""
    value = _cell(task, "label", task.label_columns, row, inner, where)
    if value is None:
        return task.gold_columns(inner, where)
    return task.gold_cell(value, "label", where)


_NUMBER_ID = re.compile(r"0*(\d+?)(?:\.0+)?")


def id_text(value: Any, where: str) -> str | None:
    """A cell's id as text; None where it is missing. 7.0 is 7: data frames hold integers so."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = cell_text(value, "id", where)
    if text is None or text.strip() in MISSING_WORDS:
        return None
    return text.strip() or None


def numeric_id(row_id: str) -> str:
    """An id as a program writes it that took it for a number: without "001"'s zeros and ".0"."""
    number = _NUMBER_ID.fullmatch(row_id)
    return row_id if number is None else number.group(1)


def respelled_ids(path: Path, row_id: str, file_id: str) -> UserError:
    """The error for a file whose id of a row was read as a number on its way."""
    return UserError(
        f"{path} has id {file_id!r} where the data have {row_id!r}: its ids were read as numbers",
        hint="write the file again with ids as text (pandas: read_csv(…, dtype={'id': str}))",
    )


def _cell(
    task: Task,
    name: str,
    default_columns: tuple[str, ...],
    row: dict[str, Any],
    inner: dict[str, Any],
    where: str,
) -> Any:
    """The value of a row's label, rationale or id; None where there is no such column.

    ``inner`` is the row's ``input`` if that is an object, else the row itself. Raises UserError
    where ``task.columns`` names a column that is not there.
    """
    mapped = task.section.columns.get(name)
    columns = default_columns if mapped is None else (mapped,)
    for cells in (row, inner):
        column = column_of(cells, columns)
        if column is not None:
            return cells[column]
    if mapped is not None and inner is row:
        raise missing_column(where, name, row, mapped)
    return None
