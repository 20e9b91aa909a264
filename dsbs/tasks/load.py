"""Rows from files or a hub into Examples, streamed: the checks, the ids, the held-out parts."""

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
from dsbs.records.rows import Example
from dsbs.tasks.base import Task, column_of

HUB = "hub://"
_SHOWN = 5  # bad rows named in one message
_MADE = re.compile(r"row-[0-9a-f]{16}")  # an id that was made from a row's content

Row = tuple[str, dict[str, Any]]  # where it stands, its columns


def split_source(recipe: Recipe, split: str) -> str:
    """The path or hub address that a split's rows come from; a held-out split comes from train's."""
    data = recipe.task.data
    return {
        "train": data.train,
        "valid": data.valid or data.train,
        "test": data.test or data.train,
    }[split]


def stream(recipe: Recipe, task: Task, split: str) -> Iterator[Example]:
    """Yield the Examples of ``train``, ``valid`` or ``test`` in file order.

    A test part that the data does not have is held out of the train file; so is a valid part, except that ``train`` still
    holds the valid part's rows (they are annotated like the rest; see ``hold_out``).
    Raises UserError for rows that cannot be used, several at a time.
    """
    data = recipe.task.data
    rows = _examples(recipe, task, split_source(recipe, split), split)
    from_train = split == "train" or (split == "valid" and data.valid is None)
    if from_train and data.test is None:
        rows = (row for row in rows if position(row.id, "test") >= data.test_fraction)
    if split == "test" and data.test is None:
        rows = (row for row in rows if position(row.id, "test") < data.test_fraction)
    if split == "valid" and data.valid is None:
        rows = (row for row in rows if is_held_out(recipe, row))
    return itertools.islice(rows, recipe.task.limit)


def load(recipe: Recipe, task: Task, split: str) -> list[Example]:
    """The whole split as a list. Raises UserError where it is empty."""
    rows = list(stream(recipe, task, split))
    if not rows:
        raise UserError(
            f"the {split} split of {split_source(recipe, split)} has no rows",
            hint="check the file; a held-out part needs a few dozen rows to hold any",
        )
    return rows


def is_held_out(recipe: Recipe, row: Example) -> bool:
    """Whether a train row belongs to the validation part that is held out where the data has none."""
    return (
        recipe.task.data.valid is None
        and position(row.id, "valid") < recipe.task.data.valid_fraction
    )


def position(row_id: str, part: str) -> float:
    """A row's fixed place in [0, 1) by the hash of its id: the same in every run, whatever else is in the file.

    Copies of one row that got their ids from their content (``…~2``) stay together.
    """
    if _MADE.match(row_id):
        row_id = row_id.partition("~")[0]
    return int(hashlib.sha256(f"{part}:{row_id}".encode()).hexdigest()[:13], 16) / 16**13


@dataclass(frozen=True, slots=True)
class Survey:
    """What one pass over a split's rows tells: how many there are, and a hash of all that is in them."""

    rows: int
    hash: str


def survey(rows: Iterable[Example]) -> Survey:
    state, count = hashlib.sha256(), 0
    for count, row in enumerate(rows, 1):  # noqa: B007 - the last one is the number of rows
        state.update(
            canonical_json([row.id, row.input, row.label, row.rationale, row.completion]).encode()
        )
        state.update(b"\n")
    return Survey(count, state.hexdigest())


def _examples(recipe: Recipe, task: Task, source: str, split: str) -> Iterator[Example]:
    seen: dict[
        int, int
    ] = {}  # 64-bit hashes of ids in place of ids: a million rows take little room
    problems: list[str] = []
    hint = "mend or remove the rows"
    empty = True
    rows = _rows(source, recipe.folder)
    while len(problems) < _SHOWN:
        try:
            where, row = next(rows)
            empty = False
            example = _example(task, row, where)
            key = int.from_bytes(hashlib.blake2b(example.id.encode(), digest_size=8).digest())
            seen[key] = seen.get(key, 0) + 1
            if seen[key] > 1 and not _MADE.fullmatch(example.id):
                raise UserError(
                    f"{where}: id {example.id!r} occurs twice (first in {_first_place(recipe, task, source, example.id)})",
                    hint="ids must be unique; drop the id column to have them made from each row's content",
                )
            if seen[key] > 1:
                example = replace(example, id=f"{example.id}~{seen[key]}")
        except StopIteration:
            break
        except UserError as error:
            problems.append(error.problem)
            hint = error.hint
            continue  # a row that cannot be read ends the generator, one that cannot be used does not
        if not problems:
            yield example
    if problems:
        more = " (and perhaps more)" if len(problems) >= _SHOWN else ""
        raise UserError(
            "\n  ".join([f"{len(problems)} unusable rows{more}:", *problems])
            if len(problems) > 1
            else problems[0],
            hint=hint,
        )
    if empty:
        raise UserError(f"{source} is empty", hint=f"task.data.{split} needs rows")


def _first_place(recipe: Recipe, task: Task, source: str, row_id: str) -> str:
    """The line of the first row of an id: read again, since only hashes are held."""
    places = (
        where
        for where, row in _rows(source, recipe.folder)
        if _example(task, row, where).id == row_id
    )
    return next(places).rpartition(":")[2]


def _example(task: Task, row: dict[str, Any], where: str) -> Example:
    columns = task.section.columns
    nested = row.get("input")
    given = nested if isinstance(nested, dict) else row
    fields = task.fields(given, where)

    def column(name: str, others: tuple[str, ...]) -> Any:
        names = (columns[name],) if name in columns else others
        found = column_of(row, names)
        if found is None and given is not row:
            found = column_of(given, names)
            return None if found is None else given[found]
        if found is None and name in columns:
            raise UserError(
                f"{where}: no column {columns[name]!r} (columns: {', '.join(map(str, row))})",
                hint=f"task.columns.{name} must name a column of the file",
            )
        return None if found is None else row[found]

    label = column("label", task.label_columns)
    if label is not None and str(label).strip() in task.no_label:
        label = None
    if label is not None:
        label = task.gold(label, fields, where)
    rationale = column("rationale", task.rationale_columns)
    teacher = row.get("teacher")
    completion = teacher.get("completion") if isinstance(teacher, dict) else None
    row_id = column("id", task.id_columns)
    if row_id is None or str(row_id).strip() == "":
        row_id = f"row-{digest(canonical_json([fields, label]))[:16]}"
    return Example(
        id=str(row_id).strip(),
        input=fields,
        label=label,
        rationale=str(rationale).strip() or None if rationale is not None else None,
        completion=completion if isinstance(completion, str) else None,
    )


def _rows(source: str, folder: Path | None) -> Iterator[Row]:
    if source.startswith(HUB):
        yield from _hub(source)
        return
    path = find_file(
        source,
        what="data file",
        hint="check task.data; paths are read from here or beside the recipe",
        beside=folder,
    )
    name = path.name.removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        for number, row in read_jsonl(path):
            yield f"{path}:{number}", row
    elif name.endswith((".csv", ".tsv")):
        yield from _csv(path, "\t" if name.endswith(".tsv") else ",")
    elif name.endswith(".parquet"):
        yield from _parquet(path)
    else:
        raise UserError(
            f"{path}: unknown kind of file", hint="use .jsonl, .jsonl.gz, .csv, .tsv or .parquet"
        )


def _csv(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(64 * 1024 * 1024)
    with open_text(path) as file:
        reader = csv.DictReader(file, delimiter=delimiter, restkey="", strict=True)
        try:
            names = reader.fieldnames or []
            if len(names) == 1 and ";" in names[0]:
                raise UserError(
                    f"{path}:1: columns are separated by ';'",
                    hint="save it with commas, or as .tsv",
                )
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise UserError(
                    f"{path}:1: two columns are called {twice[0]!r}", hint="rename one of them"
                )
            for row in reader:
                if "" in row and row[""] is not None and "" not in names:
                    raise UserError(
                        f"{path}:{reader.line_num}: more cells than columns",
                        hint="quote cells with commas",
                    )
                if None in row.values():
                    raise UserError(
                        f"{path}:{reader.line_num}: fewer cells than columns", hint="mend the row"
                    )
                yield f"{path}:{reader.line_num}", dict(row)
        except csv.Error as error:
            raise UserError(
                f"{path}:{reader.line_num + 1}: not valid CSV ({error})", hint="check the quotes"
            ) from None


def _parquet(path: Path) -> Iterator[Row]:
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


def _hub(source: str) -> Iterator[Row]:
    """``hub://<repository>[:<config>]/<split>`` through `datasets`; a local folder in place of the repository works too."""
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
    ) as error:  # the library raises a dozen unrelated kinds for "not reachable" and "not there"
        raise DsbsError(
            f"{source} cannot be loaded ({type(error).__name__}: {str(error)[:300]})",
            hint="check the name and the network, or download the rows and give a path in task.data",
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{source}:{number}", dict(row)
