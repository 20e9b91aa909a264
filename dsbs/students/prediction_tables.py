"""Files of predictions: JSON lines, .csv and .parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

from dsbs.files import atomic_write

FORMATS = (".jsonl", ".csv", ".parquet")
_PARQUET_ROWS = 8192  # in a row group


def prediction_line(prediction: dict[str, Any]) -> str:
    return json.dumps(prediction, ensure_ascii=False, default=list) + "\n"


def write_table(
    out: Path, predictions: Iterable[dict[str, Any]], *, top: bool, rationale: bool
) -> int:
    """Write predictions as the suffix of ``out`` says, complete or not at all; returns how many."""
    suffix = out.suffix.lower()
    if suffix == ".jsonl":
        with atomic_write(out) as file:
            return _counted(predictions, lambda row: file.write(prediction_line(row)))
    names = ["id", "prediction", "label", "raw", "probability", "truncated"]
    rows = iter(predictions)
    first = list(islice(rows, 1))
    predictions = chain(first, rows)
    optional = ("expected_number", "field_probabilities")
    names += [name for name in optional if any(name in row for row in first)]
    if top:
        names.append("top")
    if rationale:
        names += ["rationale", "rationale_is_causal"]
    if suffix == ".csv":
        with atomic_write(out) as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            return _counted(
                predictions, lambda row: writer.writerow(_cells(row, "top", "field_probabilities"))
            )
    with atomic_write(out, binary=True) as file:
        return _write_parquet(file, predictions, names)


def _write_parquet(file: Any, predictions: Iterable[dict[str, Any]], names: list[str]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    share = pa.struct([("label", pa.string()), ("probability", pa.float64())])
    types = {
        "probability": pa.float64(),
        "expected_number": pa.float64(),
        "truncated": pa.bool_(),
        "top": pa.list_(share),
        "field_probabilities": pa.map_(pa.string(), pa.float64()),
        "rationale_is_causal": pa.bool_(),
    }
    schema = pa.schema([(name, types.get(name, pa.string())) for name in names])
    rows = iter(predictions)
    number = 0
    with pq.ParquetWriter(file, schema) as writer:
        while group := [_cells(row) for row in islice(rows, _PARQUET_ROWS)]:
            writer.write_table(pa.Table.from_pylist(group, schema))
            number += len(group)
    return number


def _cells(prediction: dict[str, Any], *as_text: str) -> dict[str, Any]:
    """A prediction with labels that are not text, and the columns ``as_text``, as JSON."""
    cells = dict(prediction)
    for name in ("prediction", "label", *as_text):
        if not isinstance(cells.get(name), str | None):
            cells[name] = json.dumps(cells[name], ensure_ascii=False)
    return cells


def _counted(rows: Iterable[dict[str, Any]], write: Callable[[dict[str, Any]], Any]) -> int:
    number = 0
    for row in rows:
        write(row)
        number += 1
    return number
