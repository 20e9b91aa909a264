"""Data: rows from files or a hub as Examples, with checks, ids and held-out splits. Rows are
streamed.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsbs.config import Recipe
from dsbs.errors import DsbsError, UserError
from dsbs.files import canonical_json, digest, find_file, open_text, read_jsonl
from dsbs.records import Example
from dsbs.tasks import Task, column_of

HUB = "hub://"
_MAX_PROBLEMS = 5  # in one message
_CONTENT_ID = re.compile(r"row-[0-9a-f]{16}")  # made from a row's content

Row = tuple[str, dict[str, Any]]  # its place ("train.csv:7") and its columns


def split_source(recipe: Recipe, split: str) -> str:
    """The path or hub address of a split's rows; a held-out split's is train's."""
    data = recipe.task.data
    sources = {
        "train": data.train,
        "valid": data.valid or data.train,
        "test": data.test or data.train,
    }
    return sources[split]


def stream(recipe: Recipe, task: Task, split: str) -> Iterator[Example]:
    """Yield the Examples of ``train``, ``valid`` or ``test`` in the order of the file.

    A test split that the data lacks is held out of the train file. So is a valid split, but
    ``train`` still yields its rows: they are annotated like the rest (see ``is_held_out``). Raises
    UserError for unusable rows, several at a time.
    """
    data = recipe.task.data
    rows = _examples(recipe, task, split_source(recipe, split), split)
    is_from_train = split == "train" or (split == "valid" and data.valid is None)
    if is_from_train and data.test is None:
        rows = (row for row in rows if position(row.id, "test") >= data.test_fraction)
    if split == "test" and data.test is None:
        rows = (row for row in rows if position(row.id, "test") < data.test_fraction)
    if split == "valid" and data.valid is None:
        rows = (row for row in rows if is_held_out(recipe, row))
    return itertools.islice(rows, recipe.task.limit)


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
    return data.valid is None and position(row.id, "valid") < data.valid_fraction


def position(row_id: str, purpose: str) -> float:
    """A row's position in [0, 1) by a hash of its id: the same in every run, whatever else is in
    the file.

    Copies of a row whose ids come from their content (``…~2``) have the same position.
    """
    if _CONTENT_ID.match(row_id):
        row_id = row_id.partition("~")[0]
    return int(hashlib.sha256(f"{purpose}:{row_id}".encode()).hexdigest()[:13], 16) / 16**13


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


def _examples(recipe: Recipe, task: Task, source: str, split: str) -> Iterator[Example]:
    # 64-bit hashes in place of ids, so that a million rows need little memory.
    counts: dict[int, int] = {}
    problems: list[UserError] = []
    is_empty = True
    rows = _rows(source, recipe.folder)
    while len(problems) < _MAX_PROBLEMS:
        try:
            where, row = next(rows)
            is_empty = False
            example = _example(task, row, where)
            key = int.from_bytes(hashlib.blake2b(example.id.encode(), digest_size=8).digest())
            counts[key] = counts.get(key, 0) + 1
            if counts[key] > 1:
                if not _CONTENT_ID.fullmatch(example.id):
                    raise _repeated_id(recipe, task, source, where, example.id)
                example = replace(example, id=f"{example.id}~{counts[key]}")
        except StopIteration:
            break
        except UserError as error:
            # A row that cannot be read ends the generator; one that cannot be used does not.
            problems.append(error)
            continue
        if not problems:
            yield example
    if problems:
        raise _all_problems(problems)
    if is_empty:
        raise UserError(
            f"{source} is empty", hint=f"add rows, or name another file in task.data.{split}"
        )


def _all_problems(errors: list[UserError]) -> UserError:
    hint = errors[-1].hint
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
        for location, row in _rows(source, recipe.folder)
        if _example(task, row, location).id == row_id
    )
    first_line = next(locations).rpartition(":")[2]
    return UserError(
        f"{where}: id {row_id!r} occurs twice (first in line {first_line})",
        hint="ids must be unique; without an id column they are made from each row's content",
    )


def _example(task: Task, row: dict[str, Any], where: str) -> Example:
    nested = row.get("input")
    inner = nested if isinstance(nested, dict) else row
    fields = task.fields(inner, where)
    label = _cell(task, "label", task.label_columns, row, inner, where)
    if label is not None and str(label).strip() in task.no_label:
        label = None
    if label is not None:
        label = task.gold(label, fields, where)
    rationale = _cell(task, "rationale", task.rationale_columns, row, inner, where)
    if rationale is not None:
        rationale = str(rationale).strip() or None
    teacher = row.get("teacher")
    completion = teacher.get("completion") if isinstance(teacher, dict) else None
    row_id = _cell(task, "id", task.id_columns, row, inner, where)
    if row_id is None or not str(row_id).strip():
        row_id = f"row-{digest(canonical_json([fields, label]))[:16]}"
    return Example(
        id=str(row_id).strip(),
        input=fields,
        label=label,
        rationale=rationale,
        completion=completion if isinstance(completion, str) else None,
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
        raise UserError(
            f"{where}: no column {mapped!r} (columns: {', '.join(map(str, row))})",
            hint=f"task.columns.{name} must name a column of the file",
        )
    return None


def _rows(source: str, folder: Path | None) -> Iterator[Row]:
    if source.startswith(HUB):
        yield from _hub_rows(source)
        return
    path = find_file(
        source,
        what="data file",
        hint="check task.data; paths are relative to the working directory or to the recipe",
        beside=folder,
    )
    name = path.name.removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        for number, row in read_jsonl(path):
            yield f"{path}:{number}", row
    elif name.endswith((".csv", ".tsv")):
        yield from _csv_rows(path, "\t" if name.endswith(".tsv") else ",")
    elif name.endswith(".parquet"):
        yield from _parquet_rows(path)
    else:
        raise UserError(
            f"{path}: unknown file format", hint="use .jsonl, .jsonl.gz, .csv, .tsv or .parquet"
        )


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(64 * 1024 * 1024)
    with open_text(path) as file:
        reader = csv.DictReader(file, delimiter=delimiter, restkey="", strict=True)
        try:
            names = reader.fieldnames or []
            _check_header(path, names)
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if "" in row and row[""] is not None and "" not in names:
                    raise UserError(
                        f"{where}: more cells than columns", hint="quote cells with commas"
                    )
                if None in row.values():
                    raise UserError(f"{where}: fewer cells than columns", hint="fix the row")
                yield where, dict(row)
        except csv.Error as error:
            raise UserError(
                f"{path}:{reader.line_num + 1}: not valid CSV ({error})", hint="check the quotes"
            ) from None


def _check_header(path: Path, names: Iterable[str]) -> None:
    names = list(names)
    if len(names) == 1 and ";" in names[0]:
        raise UserError(
            f"{path}:1: columns are separated by ';'", hint="save it with commas, or as .tsv"
        )
    for name in sorted(names):
        if names.count(name) > 1:
            raise UserError(f"{path}:1: two columns are called {name!r}", hint="rename one of them")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path} is not a readable parquet file ({error})", hint="write it again"
        ) from None


def _hub_rows(source: str) -> Iterator[Row]:
    """Rows of ``hub://<repository>[:<config>]/<split>``; the repository may be a local folder."""
    repository, _, split = source.removeprefix(HUB).rpartition("/")
    repository, _, config = repository.partition(":")
    if not repository or not split:
        raise UserError(
            f"{source} is not of the form hub://owner/name/split",
            hint="e.g. hub://ChilleD/SVAMP/train",
        )
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(repository, config or None, split=split)
    except ValueError as error:
        raise UserError(
            f"{source}: {error}", hint="check the repository's splits and configurations"
        ) from None
    except (
        Exception
    ) as error:  # the library has many unrelated errors for a missing or unreachable repository
        raise DsbsError(
            f"{source} cannot be loaded ({type(error).__name__}: {str(error)[:300]})",
            hint="check the name and the network, or download the rows and set task.data",
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{source}:{number}", dict(row)
