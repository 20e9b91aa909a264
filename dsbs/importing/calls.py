"""Calls of a log: JSON files are streamed into a temporary database, which joins requests and
replies.

Memory does not grow with the log. The database is an unnamed file that disappears with the process;
a few-shot prompt that thousands of calls share is stored once.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dsbs.errors import UserError
from dsbs.files import canonical_json, digest, open_text
from dsbs.importing.bodies import Message, Record
from dsbs.importing.formats import read_object
from dsbs.progress import Progress

MAX_LINE = 64 << 20  # characters
MAX_DOCUMENT = 128 << 20  # characters of a file that is one JSON value, which is read at once
_VALUE = re.compile(r"[^\s,\x1e]")
_PROGRESS_EVERY = 500  # entries
_HINT = (
    "dsbs import reads JSON: logs of OpenAI, Azure, Bedrock, Anthropic and OpenTelemetry, and "
    "lines with messages"
)
_TABLES = """
PRAGMA synchronous=OFF;
PRAGMA journal_mode=OFF;
CREATE TABLE contexts (n INTEGER PRIMARY KEY, hash TEXT UNIQUE, messages TEXT);
CREATE TABLE calls (n INTEGER PRIMARY KEY, id TEXT, context INTEGER, question TEXT, prefill TEXT,
                    completion TEXT, reasoning TEXT, model TEXT, gold TEXT);
CREATE TABLE failed (n INTEGER PRIMARY KEY, context INTEGER, question TEXT, model TEXT);
CREATE TABLE seen (key BLOB PRIMARY KEY, times INTEGER) WITHOUT ROWID;
CREATE TABLE requests (n INTEGER PRIMARY KEY, key TEXT, part INTEGER, messages TEXT, model TEXT,
                       problem TEXT);
CREATE TABLE replies (n INTEGER PRIMARY KEY, key TEXT, id TEXT, completion TEXT, reasoning TEXT,
                      model TEXT, problem TEXT, gold TEXT);
"""


@dataclass(slots=True)
class Tally:
    """Counts of what was read: calls by format, skipped entries by reason, tokens."""

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


@dataclass(frozen=True, slots=True)
class Call:
    """One call: the messages before its last question, the question, and the reply."""

    id: str | None
    context: int
    question: str
    completion: str
    reasoning: str | None
    model: str | None
    gold: Any = None


class CallStore:
    """All calls of a log, on disk."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.executescript(_TABLES)
        self._db.execute("BEGIN")
        self.tally = Tally()

    def close(self) -> None:
        self._db.close()

    def read(self, files: Sequence[Path], progress: Progress) -> None:
        """Read all entries of ``files``. Raises UserError where none has a known format."""
        progress.start("reading entries", None)
        for path in files:
            for where, value in read_values(path, self.tally):
                self._add_object(where, value)
                if self.tally.entries % _PROGRESS_EVERY == 0:
                    progress.update(self.tally.entries)
        progress.finish()
        self._join()
        if not self.tally.formats:
            raise self._nothing(files)

    def _nothing(self, files: Sequence[Path]) -> UserError:
        first = self.tally.first_skipped
        reasons = ", ".join(
            f"{reason} {number:,} (first: {first[reason]})" if reason in first else reason
            for reason, number in self.tally.skipped.most_common()
        )
        names = ", ".join(map(str, files[:3])) + (" …" if len(files) > 3 else "")
        problem = f"{names}: no entry of a log was recognized"
        return UserError(f"{problem}: {reasons}" if reasons else f"{names}: empty", hint=_HINT)

    def _add_object(self, where: str, value: dict[str, Any]) -> None:
        self.tally.entries += 1
        is_known = False
        try:
            for name, record in read_object(value):
                is_known = True
                self._add(record, name, where)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            self.tally.skip("malformed entry", where)
            return
        if not is_known:
            self.tally.skip("unknown format", where)

    def _add(self, record: Record, name: str, where: str) -> None:
        self.tally.formats[name] += 1
        self.tally.prompt_tokens += record.usage.prompt or 0
        self.tally.completion_tokens += record.usage.completion or 0
        texts = [text for _, text in record.messages or ()]
        if any("\0" in text for text in (*texts, record.completion or "")):
            record.problem = "a NUL character"
        if record.half is not None and record.key is not None:
            self._add_half(record)
        elif record.problem is not None:
            self.tally.skip(record.problem, where)
            if record.problem == "error":
                self._add_failed(record.messages, record.model)
        elif record.messages is None:
            self.tally.skip("no prompt", where)
        elif record.completion is None:
            self.tally.skip("no reply", where)
        else:
            gold = None if record.gold is None else canonical_json(record.gold)
            self._add_call(record, record.messages, record.completion, gold)

    def _add_half(self, record: Record) -> None:
        gold = None if record.gold is None else canonical_json(record.gold)
        row: dict[str, Any] = {"key": record.key, "model": record.model, "problem": record.problem}
        if record.half == "request":
            messages = _json(record.messages or ())
            self._insert("requests", row | {"part": record.is_part, "messages": messages})
        else:
            reply = {"id": record.id, "completion": record.completion}
            reply["reasoning"] = record.reasoning
            self._insert("replies", row | reply | {"gold": gold})

    def _insert(self, table: str, row: dict[str, Any]) -> int:
        """Insert a row, and return its number."""
        marks = ", ".join("?" * len(row))
        cursor = self._db.execute(
            f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", tuple(row.values())
        )
        return int(cursor.lastrowid or 0)

    def _add_call(
        self, record: Record, messages: list[Message], completion: str, gold: str | None
    ) -> None:
        """Split a prompt into its context, its last question and the beginning of the reply that
        the request may give.
        """
        messages, prefill = _without_prefill(messages)
        if not messages:
            self.tally.skip("no prompt")
            return
        row: dict[str, Any] = {"id": record.id, "context": self._context(messages[:-1])}
        row |= {"question": messages[-1][1], "completion": prefill + completion}
        row |= {"reasoning": record.reasoning, "model": record.model, "gold": gold}
        self._insert("calls", row)

    def _add_failed(self, messages: list[Message] | None, model: str | None) -> None:
        """Keep the prompt of a call that ended with an error."""
        messages, _ = _without_prefill(messages or [])
        if messages:
            context = self._context(messages[:-1])
            values = {"context": context, "question": messages[-1][1], "model": model}
            self._insert("failed", values)

    def _context(self, messages: list[Message]) -> int:
        text = _json(messages)
        key = digest(text)
        row = self._db.execute("SELECT n FROM contexts WHERE hash = ?", (key,)).fetchone()
        if row is None:
            return self._insert("contexts", {"hash": key, "messages": text})
        return int(row[0])

    # --- halves

    def _join(self) -> None:
        """Make calls of the requests and replies with the same key."""
        self._db.execute("CREATE INDEX request_keys ON requests (key)")
        self._db.execute("CREATE INDEX reply_keys ON replies (key)")
        replies = self._db.execute(
            "SELECT key, id, completion, reasoning, model, problem, gold FROM replies ORDER BY n"
        )
        answered = {
            key
            for (key,) in self._db.execute(
                "SELECT DISTINCT key FROM replies WHERE completion IS NULL "
                "AND key IN (SELECT key FROM replies WHERE completion IS NOT NULL)"
            )
        }
        for key, row_id, completion, reasoning, model, problem, gold in replies:
            if completion is None and key in answered:
                continue  # a span whose messages are records of their own
            if problem is not None or completion is None:
                self.tally.skip(problem or "no reply")
                if problem == "error":
                    messages, request_model, _ = self._request(key)
                    self._add_failed(messages, model or request_model)
                continue
            messages, request_model, reason = self._request(key)
            if messages is None:
                self.tally.skip(reason)
                continue
            if model is None and key in answered:
                request_model = self._span_model(key)
            record = Record(id=row_id, reasoning=reasoning, model=model or request_model)
            self._add_call(record, messages, completion, gold)
        (unanswered,) = self._db.execute(
            "SELECT count(DISTINCT key) FROM requests WHERE key NOT IN (SELECT key FROM replies)"
        ).fetchone()
        if unanswered:
            self.tally.skip("no reply", number=unanswered)

    def _request(self, key: str) -> tuple[list[Message] | None, str | None, str]:
        """The messages of the request with a key, and its model; or why there is none."""
        rows = self._db.execute(
            "SELECT part, messages, model, problem FROM requests WHERE key = ? ORDER BY n "
            "LIMIT 1000",
            (key,),
        ).fetchall()
        problem = next((problem for *_, problem in rows if problem), None)
        if problem is not None:
            return None, None, problem
        requests = [(messages, model) for part, messages, model, _ in rows if not part]
        if requests:
            if len({messages for messages, _ in requests}) > 1:
                return None, None, "several requests with one custom_id"
            messages, model = requests[0]
            return _messages(messages), model, ""
        if rows:
            parts = [message for _, messages, *_ in rows for message in _messages(messages)]
            return parts, next((row[2] for row in rows if row[2]), None), ""
        return None, None, "no prompt in the log"

    def _span_model(self, key: str) -> str | None:
        row = self._db.execute(
            "SELECT model FROM replies WHERE key = ? AND model IS NOT NULL", (key,)
        ).fetchone()
        return None if row is None else row[0]

    def times_seen(self, kind: str, text: str) -> int:
        """How often a text of a kind was seen, including this time."""
        (times,) = self._db.execute(
            "INSERT INTO seen VALUES (?, 1) ON CONFLICT DO UPDATE SET times = times + 1 "
            "RETURNING times",
            (bytes.fromhex(digest(kind, text)[:32]),),
        ).fetchone()
        return int(times)

    # --- queries

    def models(self) -> dict[str, int]:
        """Calls by model; "" where the log does not name it."""
        rows = self._db.execute(
            "SELECT coalesce(model, ''), count(*) FROM calls GROUP BY 1 ORDER BY 2 DESC, 1"
        )
        return dict(rows.fetchall())

    def contexts(self, model: str) -> Iterator[tuple[int, list[Message], int]]:
        """Each context of a model's calls: its number, messages and calls."""
        rows = self._db.execute(
            "SELECT context, count(*) FROM calls WHERE coalesce(model, '') = ? "
            "GROUP BY context ORDER BY context",
            (model,),
        )
        for number, calls in rows:
            yield number, self.context(number), calls

    def context(self, number: int) -> list[Message]:
        (text,) = self._db.execute(
            "SELECT messages FROM contexts WHERE n = ?", (number,)
        ).fetchone()
        return _messages(text)

    def calls(
        self, model: str, contexts: Sequence[int], limit: int | None = None
    ) -> Iterator[Call]:
        """The calls of a model with one of ``contexts``, in the order of the log.

        With ``limit``, at most about that many of them, evenly spread.
        """
        self._db.execute("CREATE TEMP TABLE IF NOT EXISTS chosen (context INTEGER PRIMARY KEY)")
        self._db.execute("DELETE FROM chosen")
        self._db.executemany("INSERT INTO chosen VALUES (?)", [(number,) for number in contexts])
        source = (
            "FROM calls WHERE coalesce(model, '') = ? AND context IN (SELECT context FROM chosen)"
        )
        stride = 1
        if limit is not None:
            (total,) = self._db.execute(f"SELECT count(*) {source}", (model,)).fetchone()
            stride = max(1, -(-total // limit))
        rows = self._db.execute(
            f"SELECT id, context, question, completion, reasoning, model, gold {source} ORDER BY n",
            (model,),
        )
        for number, (row_id, context, question, completion, reasoning, name, gold) in enumerate(
            rows
        ):
            if number % stride == 0:
                value = None if gold is None else json.loads(gold)
                yield Call(row_id, context, question, completion, reasoning, name, value)

    def failed(self, model: str) -> Iterator[tuple[int, str]]:
        """Context and question of the calls to a model that ended with an error, in the order of
        the log. An error leaves the name in the request alone, an alias perhaps of the name that
        replies have: only what names another model that replied is left out.
        """
        rows = self._db.execute(
            "SELECT context, question FROM failed WHERE coalesce(model, '') = ? OR "
            "coalesce(model, '') NOT IN (SELECT coalesce(model, '') FROM calls) ORDER BY n",
            (model,),
        )
        yield from rows


def _without_prefill(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """The messages up to the last question, and the beginning of the reply that follows it."""
    messages = [message for message in messages if message[1].strip()]
    prefill = ""
    while messages and messages[-1][0] == "assistant":
        prefill = messages.pop()[1] + prefill
    return messages, prefill


def _json(messages: Sequence[Message]) -> str:
    return json.dumps(messages, ensure_ascii=False)


def _messages(text: str) -> list[Message]:
    return [(role, content) for role, content in json.loads(text)]


# --- files


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
