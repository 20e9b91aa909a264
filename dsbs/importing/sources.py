"""Files of a log: JSON lines, or JSON values of several lines, streamed, with what was skipped."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dsbs.errors import UserError
from dsbs.files import open_text

MAX_LINE = 64 << 20  # characters
MAX_DOCUMENT = 128 << 20  # characters of a file that is one JSON value, which is read at once
_VALUE = re.compile(r"[^\s,\x1e]")
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".log", ".txt", ".gz")


@dataclass(slots=True)
class Tally:
    """What was read: calls by format, entries without a row by reason, tokens."""

    entries: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: dict[str, str] = field(default_factory=dict)
    """By reason, the file and line of the first entry."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def skip(self, reason: str, where: str | None = None, number: int = 1) -> None:
        self.skipped[reason] += number
        if where is not None:
            self.first_skipped.setdefault(reason, where)


def source_files(sources: Sequence[str | Path]) -> list[Path]:
    """The files of ``sources``, each a file or a folder. Raises UserError where there are none."""
    files: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            inner = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _SUFFIXES)
            if not inner:
                raise UserError(
                    f"{path} has no log files ({', '.join(_SUFFIXES)})", hint="name the files"
                )
            files += inner
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(
                f"log {source} does not exist (working directory: {Path.cwd()})",
                hint="give a file or a directory with the log's files",
            )
    return list(dict.fromkeys(files))


def read_values(path: Path, tally: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and line, object) of JSON lines, or of a file that is one JSON value or several.

    Lines that cannot be used are counted, never shown: they may hold secrets.
    """
    is_first = True
    with open_text(path, errors="replace") as file:
        for number, line in _lines(file):
            where = f"{path}:{number}"
            if line is None:
                tally.skip(f"a line of more than {MAX_LINE >> 20} MB", where)
                continue
            text = line.strip().strip("\x1e")  # RFC 7464 begins a line with a record separator
            if not text:
                continue
            try:
                value = json.loads(text)
            except RecursionError:
                tally.skip("nested too deeply", where)
            except ValueError:
                document = _document(path) if is_first and text[0] in "{[" else None
                if document is not None:
                    yield from _values_of(document, path, tally)
                    return
                if text in ("{", "["):
                    raise _not_lines(path) from None
                tally.skip("not valid JSON", where)
            else:
                yield from _objects(where, value, tally)
            is_first = False


def _not_lines(path: Path) -> UserError:
    return UserError(
        f"{path} is not JSON lines, and larger than {MAX_DOCUMENT >> 20} MB",
        hint=f"write one object per line: jq -c . {path.name}",
    )


def _lines(file: TextIO) -> Iterator[tuple[int, str | None]]:
    """Each line with its number; None in place of one that is too long."""
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if line.endswith("\n") or len(line) < MAX_LINE:
            yield number, line
            continue
        while (rest := file.readline(MAX_LINE)) and not rest.endswith("\n"):
            pass
        yield number, None


def _document(path: Path) -> str | None:
    """A whole file. None: it is too large."""
    with open_text(path, errors="replace") as file:
        text = file.read(MAX_DOCUMENT + 1)
    return text if len(text) <= MAX_DOCUMENT else None


def _values_of(text: str, path: Path, tally: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a text whose JSON values may have several lines each."""
    decoder = json.JSONDecoder()
    line = 1
    position = 0
    while match := _VALUE.search(text, position):
        start = match.start()
        line += text.count("\n", position, start)
        where = f"{path}:{line}"
        try:
            value, position = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            tally.skip("not valid JSON", where)
            position = text.find("\n", start)
            if position < 0:
                return
        else:
            line += text.count("\n", start, position)
            yield from _objects(where, value, tally)


def _objects(where: str, value: Any, tally: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield where, value
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        for entry in value:
            if isinstance(entry, dict):
                yield where, entry
    else:
        tally.skip("not an object", where)
