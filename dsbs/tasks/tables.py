"""Tables: rows of CSV, TSV, JSON lines and parquet files, and of the Hub. Every command reads rows
here.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsbs.errors import DsbsError, UserError
from dsbs.files import find_file, open_text, read_jsonl

logger = logging.getLogger(__name__)
HUB = "hub://"
_FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}

Row = tuple[str, dict[str, Any]]  # its place ("train.csv:7") and its columns
Records = Iterator[tuple[int, list[str]]]  # the line where each row of a table starts, its cells


def source_rows(source: str, folder: Path | None) -> Iterator[Row]:
    """The rows of a file or of ``hub://…``. ``folder``: where a recipe lies, for its files."""
    if source.startswith(HUB):
        yield from _hub_rows(source)
        return
    path = find_file(
        source,
        what="data file",
        hint="check task.data; paths are relative to the working directory or to the recipe",
        folder=folder,
    )
    yield from read_table(path)


def format_of(path: str | Path) -> str | None:
    """The format of a file of rows by its suffix, in upper or lower case; None: another file."""
    name = Path(path).name.lower().removesuffix(".gz")
    return _FORMATS.get(Path(name).suffix)


def read_table(path: Path) -> Iterator[Row]:
    """The rows of a file, each with its place. Raises UserError with the line of a mistake."""
    file_format = format_of(path)
    if file_format == "jsonl":
        for number, row in read_jsonl(path):
            yield f"{path}:{number}", row
    elif file_format in ("csv", "tsv"):
        yield from _delimited_rows(path, file_format)
    elif file_format == "parquet":
        yield from _parquet_rows(path)
    else:
        raise UserError(
            f"{path}: unknown file format",
            hint="use .jsonl, .csv or .tsv (each also with .gz), or .parquet; unpack others",
        )


# --- CSV and TSV


def _delimited_rows(path: Path, file_format: str) -> Iterator[Row]:
    """Rows of named cells. Rows and trailing columns that are empty are left out."""
    names: list[str] = []
    with open_text(path) as file:
        if file_format == "csv":
            records = _csv_records(path, file, ",")
        elif _is_quoted(path, path.stat().st_mtime_ns):
            records = _csv_records(path, file, "\t")
        else:
            records = ((number, _plain_cells(line)) for number, line in enumerate(file, 1))
        for number, cells in records:
            where = f"{path}:{number}"
            if not any(cell.strip() for cell in cells):
                continue
            if names:
                yield where, _named_cells(where, names, cells)
            else:
                names = [name.strip() for name in cells[: _width(cells)]]
                _check_header(path, names)


def spreadsheet_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file that a spreadsheet saved, each with its number there: 2 is the first
    row below the names.

    Commas, semicolons or tabs between the cells; UTF-8, or UTF-16 with a byte order mark. Raises
    UserError for a file that is no table.
    """
    names: list[str] = []
    with open_text(path) as file:
        lines = io.StringIO(file.read(), newline="")  # any line ends, also within a cell
        first = lines.readline()
        offset = 1
        if first.lower().startswith("sep="):  # Excel's way to name the separator
            first = lines.readline()
            offset = 2
        delimiter = max(",;\t", key=first.count)
        records = _csv_records(path, itertools.chain([first], lines), delimiter)
        for number, (_, cells) in enumerate(records, offset):
            if not any(cell.strip() for cell in cells):
                continue
            if names:
                padded = cells + [""] * (len(names) - len(cells))
                yield number, _named_cells(f"{path}: row {number}", names, padded)
            else:
                names = [name.strip() for name in cells[: _width(cells)]]
                _check_names(str(path), names)


def _plain_cells(line: str) -> list[str]:
    return line.rstrip("\r\n").split("\t")


def _csv_records(path: Path, lines: Iterable[str], delimiter: str) -> Records:
    csv.field_size_limit(64 * 1024 * 1024)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    start = 1
    try:
        for cells in reader:
            yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}:{start}: not valid CSV ({error})",
            hint='close each quoted cell, and double the quotes inside it ("")',
        ) from None


def _width(header: Sequence[str]) -> int:
    """The number of a table's columns, without those at its end that have no name."""
    return max(i for i, name in enumerate(header, 1) if name.strip())


def _fits(cells: Sequence[str], width: int) -> bool:
    return len(cells) >= width and not any(cell.strip() for cell in cells[width:])


def _named_cells(where: str, names: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    width = len(names)
    if not _fits(cells, width):
        comparison = "fewer" if len(cells) < width else "more"
        raise UserError(
            f"{where}: {comparison} cells than columns ({len(cells)} and {width})",
            hint="fix the row; a cell with the delimiter in it needs quotes",
        )
    first = next(i for i, name in enumerate(names) if name)  # before it: the index of a data frame
    for name, cell in zip(names[first:], cells[first:], strict=False):
        if not name and cell.strip():
            raise UserError(
                f"{where}: {cell[:60]!r} is in a column without a name", hint="name the column"
            )
    return {name: cell for name, cell in zip(names, cells, strict=False) if name}


class _Shape:
    """The shape of a table: its number of rows, and whether they have equally many cells."""

    def __init__(self, records: Iterable[list[str]]) -> None:
        self.rows = 0
        self.width = 0
        self.is_even = True
        self.opens_quotes = False
        self.has_breaks_with_tabs = False
        for cells in records:
            if not any(cell.strip() for cell in cells):
                continue
            self.rows += 1
            self.width = self.width or _width(cells)
            self.is_even = self.is_even and _fits(cells, self.width)
            for cell in cells:
                self.opens_quotes = self.opens_quotes or cell.startswith('"')
                if "\n" in cell and "\t" in cell:
                    self.has_breaks_with_tabs = True


@lru_cache(maxsize=64)
def _is_quoted(path: Path, _modified: int) -> bool:
    """Whether the cells of a TSV are in CSV's quotes.

    TSV has no quoting (IANA text/tab-separated-values): a quote is a character like any other, and
    two lines are two rows. Spreadsheets and CSV libraries quote cells with a tab, a line break or a
    quote nevertheless. A file counts as quoted where only that reading gives all rows equally many
    cells, or where both do and every quote is one that such a writer needs. Raises UserError where
    the number of rows stays open.
    """
    with open_text(path) as file:
        lines = _Shape(map(_plain_cells, file))
    if not lines.opens_quotes:
        return False
    with open_text(path) as file:
        try:
            quoted = _Shape(cells for _, cells in _csv_records(path, file, "\t"))
        except UserError:
            return False
    if not quoted.is_even:
        return False
    if not lines.is_even:
        if quoted.has_breaks_with_tabs:
            raise _open_quotes(path, "some lines have more or fewer cells than the header")
        return True
    if lines.rows == quoted.rows:
        with open_text(path) as file, open_text(path) as same_file:
            records = (cells for _, cells in _csv_records(path, same_file, "\t"))
            # CSV readers pass over blank lines; here they are rows without cells.
            return all(map(_needs_quotes, map(_plain_cells, file), records))
    if quoted.width == 1:
        raise _open_quotes(
            path,
            f"it has {lines.rows} lines, or {quoted.rows} rows if quotes enclose line breaks",
        )
    logger.warning(
        "%s: quotes are read as characters, as TSV has no quoting: %d rows. If they enclose cells, "
        "save the file as .csv",
        path,
        lines.rows - 1,
    )
    return False


def _needs_quotes(cells: Sequence[str], quoted_cells: Sequence[str]) -> bool:
    """Whether a writer of quoted cells may have written this line.

    It quotes all cells, or those with a quote or (spreadsheets) a comma, and no other has a quote.
    """
    pairs = list(zip(cells, quoted_cells, strict=False))
    if all(cell != text for cell, text in pairs):
        return True
    return all(
        ('"' in text) == (cell != text) or ("," in text and cell != text) for cell, text in pairs
    )


def _open_quotes(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: it is unclear whether quotes enclose cells here: {reason}",
        hint="save it as .csv (quoted cells) or .jsonl",
    )


def _check_header(path: Path, names: Sequence[str]) -> None:
    if "\0" in "".join(names):
        raise UserError(
            f"{path}:1: NUL characters: the file is not text, or is UTF-16 without a byte order "
            "mark",
            hint="save it as UTF-8",
        )
    if len(names) == 1:
        for delimiter in ";", "\t", ",", "|":
            if delimiter in names[0]:
                raise UserError(
                    f"{path}:1: columns are separated by {delimiter!r}",
                    hint="save it with commas as .csv, or with tabs as .tsv",
                )
    _check_names(f"{path}:1", names)


def _check_names(where: str, names: Iterable[str]) -> None:
    counts = Counter(names)
    for name, number in sorted(counts.items()):
        if number > 1 and name:
            raise UserError(f"{where}: two columns are called {name!r}", hint="rename one of them")


# --- parquet and the Hub


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        schema = file.schema_arrow
        _check_names(str(path), schema.names)
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        classes = _class_names(features.get("info", {}).get("features", {}))
        for batch in file.iter_batches(batch_size=1024):
            for row in _batch_rows(batch, path, number):
                number += 1
                yield f"{path}:{number}", _with_class_names(row, classes)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is not a readable parquet file ({error})", hint="write it again"
        ) from None


def _batch_rows(batch: Any, path: Path, number: int) -> Iterator[dict[str, Any]]:
    """A batch's rows; ``number`` rows come before it."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):  # a value that Python cannot hold: find its row
        for i in range(batch.num_rows):
            try:
                row = batch.slice(i, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                raise UserError(
                    f"{path}:{number + i + 1}: the row cannot be read ({error})",
                    hint="text must be UTF-8, and dates within the years 1 to 9999",
                ) from None
            yield from row


def _class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the class numbers in each column of a Hub data set."""
    classes = {}
    for column, feature in features.items():
        names = feature.get("names") if isinstance(feature, dict) else None
        names = names or getattr(feature, "names", None)
        if isinstance(names, list):
            classes[column] = names
    return classes


def _with_class_names(row: dict[str, Any], classes: Mapping[str, list[str]]) -> dict[str, Any]:
    """Replace class numbers by their names; -1 is the number of an unlabeled row."""
    for column, names in classes.items():
        value = row.get(column)
        if isinstance(value, int) and -1 <= value < len(names):
            row[column] = None if value == -1 else names[value]
    return row


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
    classes = _class_names(rows.features or {})
    for number, row in enumerate(rows, 1):
        yield f"{source}:{number}", _with_class_names(dict(row), classes)
