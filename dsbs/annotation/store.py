"""Reply store: every paid reply, raw, in SQLite, committed before it is used."""

from __future__ import annotations

import re
import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from dsbs.annotation.backends import RejectedError, Reply, Request
from dsbs.annotation.backends.faults import ending, is_final, plain_ending
from dsbs.errors import DsbsError, PartialError, UserError
from dsbs.files import allocate, canonical_json, digest, now
from dsbs.run_folder import RunFolder

_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT NOT NULL,               -- of the request: see request_keys
    max_tokens INTEGER NOT NULL,     -- a reply that this budget cut does not answer a larger one
    sample INTEGER NOT NULL,
    endpoint TEXT NOT NULL,
    model TEXT,
    text TEXT NOT NULL,
    finish_reason TEXT,
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    reasoning TEXT,                  -- a reasoning model's text beside the visible one
    raw TEXT NOT NULL,               -- the reply as received
    created TEXT NOT NULL,
    cached_tokens INTEGER,           -- of the prompt tokens, those from the provider's cache
    lane TEXT NOT NULL DEFAULT 'online',  -- or 'batch'
    seconds REAL,                    -- from sending to receiving
    PRIMARY KEY (key, max_tokens)
);
CREATE TABLE IF NOT EXISTS refusals (
    key TEXT PRIMARY KEY,
    said TEXT NOT NULL,              -- the endpoint's message
    created TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS failures (
    key TEXT PRIMARY KEY,
    said TEXT NOT NULL,              -- why the last attempts brought no reply
    created TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS wasted (  -- replies that are on the bill and hold no answer
    key TEXT NOT NULL,
    number INTEGER NOT NULL,
    said TEXT NOT NULL,              -- why it is no answer
    finish_reason TEXT,
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    cached_tokens INTEGER,
    lane TEXT NOT NULL,
    raw TEXT NOT NULL,               -- the reply as received
    created TEXT NOT NULL,
    PRIMARY KEY (key, number)
);
"""
# columns that the first stores did not have
_ADDED_COLUMNS = {
    "cached_tokens": "INTEGER",
    "lane": "TEXT NOT NULL DEFAULT 'online'",
    "seconds": "REAL",
}
_REPLY = (
    "text, finish_reason, prompt_tokens, completion_tokens, reasoning, cached_tokens, lane, seconds"
)
_COLUMNS = f"key, max_tokens, sample, endpoint, model, {_REPLY}, raw, created"
_BUDGET_FIELDS = ("max_tokens", "max_completion_tokens")
REFUSALS_IN_A_ROW = 16  # of one message; then it is found out whether all are refused
_RESERVE_PER_REPLY = 32 << 10  # bytes for each reply in flight when the disk fills up
_MIN_RESERVE = 1 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    """What a store has for a request under any of its keys.

    ``reply`` is the reply that answers it, ``key`` the reply's key, or the first one.
    ``wasted`` are further replies that were billed for it. ``refusal`` and ``failure`` are the
    endpoint's messages, where there is no reply.
    """

    key: str
    reply: Reply | None = None
    wasted: tuple[Reply, ...] = ()
    refusal: str | None = None
    failure: str | None = None


def request_keys(request: Request, identities: Sequence[str]) -> list[str]:
    """The key of a request's reply at each endpoint.

    It covers the whole body except the token budget, the endpoint, and the sample's index.
    """
    body = canonical_json(
        {name: value for name, value in request.body.items() if name not in _BUDGET_FIELDS}
    )
    return [digest(body, identity, str(request.sample)) for identity in identities]


def token_budget(body: Mapping[str, Any]) -> int:
    """The most completion tokens that a request asks for; 0: it does not say."""
    for name in _BUDGET_FIELDS:
        if isinstance(body.get(name), int):
            return int(body[name])
    return 0


def open_store(run: RunFolder, parent_run: RunFolder | None = None) -> ReplyStore:
    """The store of a run; a shard's also finds the replies of the run that it is a part of."""
    if parent_run is None:
        return ReplyStore(run.replies)
    return ReplyStore(run.replies, fallback=parent_run.replies)


class ReplyStore:
    """``annotate/replies.sqlite``. One process writes; others may read at the same time (WAL).

    ``fallback`` is another store that is read where this one has no reply, and never written.
    Raises UserError for a file that cannot be opened, PartialError for a full disk.
    """

    def __init__(self, path: Path, fallback: Path | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._reserve = path.with_name(f".{path.name}.reserve")
        self._holds_reserve = False
        self._fallback: sqlite3.Connection | None = None
        try:
            # one thread at a time uses it, not always the one that opened it
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            # a commit survives the death of this process; only a power cut can take the last few
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
            columns = {row[1] for row in self._db.execute("PRAGMA table_info(replies)")}
            for column, definition in _ADDED_COLUMNS.items():
                if column not in columns:
                    self._db.execute(f"ALTER TABLE replies ADD COLUMN {column} {definition}")
            if fallback is not None and fallback.is_file():
                ReplyStore(fallback).close()  # adds missing columns
                self._fallback = sqlite3.connect(
                    f"{fallback.resolve().as_uri()}?mode=ro",
                    uri=True,
                    isolation_level=None,
                    check_same_thread=False,
                )
        except sqlite3.OperationalError as error:
            if _is_full(error):
                raise self._full(error) from None
            raise UserError(
                f"{path} cannot be opened ({error})",
                hint="check the folder's permissions, or pass --out",
            ) from None
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{path} cannot be opened ({error})", hint="move the file away, or pass --out"
            ) from None

    # --- reading

    def look_up(self, keys: Sequence[str], max_tokens: int, *, raw: bool = False) -> Stored:
        """What there is for a request. A reply that broke off, or that a smaller budget cut, is no
        answer.

        ``Reply.raw`` is read only where ``raw`` is set.
        """
        columns = f"{_REPLY}, raw" if raw else _REPLY
        query = f"SELECT max_tokens, {columns} FROM replies WHERE key = ? ORDER BY max_tokens DESC"
        answer: tuple[str, Reply] | None = None
        wasted: list[Reply] = []
        for db in self._readable():
            for key in keys:
                for budget, *row in db.execute(query, (key,)):
                    reply = Reply(*row)
                    if answer is None and _is_answer(reply, budget, max_tokens):
                        reason = plain_ending(reply.finish_reason)
                        answer = key, replace(reply, finish_reason=reason)
                    elif answer is None or reply != answer[1]:
                        wasted.append(reply)
                wasted += (
                    Reply("", *row)
                    for row in db.execute(
                        "SELECT finish_reason, prompt_tokens, completion_tokens, NULL,"
                        " cached_tokens, lane FROM wasted WHERE key = ?",
                        (key,),
                    )
                )
        if answer is not None:
            return Stored(*answer, tuple(wasted))
        return Stored(
            keys[0], None, tuple(wasted), self.refusal(keys), self._said("failures", keys)
        )

    def refusal(self, keys: Sequence[str]) -> str | None:
        """The message with which an endpoint refused one of ``keys`` for good; None: none did."""
        message = self._said("refusals", keys)
        return message if message is not None and is_final(message) else None

    def _said(self, table: str, keys: Sequence[str]) -> str | None:
        for db in self._readable():
            for key in keys:
                row = db.execute(f"SELECT said FROM {table} WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    return str(row[0])
        return None

    def has_replies(self, endpoints: Sequence[str], model: str | None) -> bool:
        """Whether these endpoints have ever answered for this model."""
        marks = ", ".join("?" * len(endpoints))
        query = f"SELECT 1 FROM replies WHERE model IS ? AND endpoint IN ({marks}) LIMIT 1"
        return any(db.execute(query, (model, *endpoints)).fetchone() for db in self._readable())

    def mean_seconds(self, endpoints: Sequence[str], model: str | None) -> float | None:
        """Mean seconds of an online reply of these endpoints and this model; None: none yet."""
        marks = ", ".join("?" * len(endpoints))
        mean: float | None = self._db.execute(
            "SELECT avg(seconds) FROM replies"
            f" WHERE lane = 'online' AND model IS ? AND endpoint IN ({marks})",
            (model, *endpoints),
        ).fetchone()[0]
        return mean

    def _readable(self) -> Iterator[sqlite3.Connection]:
        yield self._db
        if self._fallback is not None:
            yield self._fallback

    # --- writing

    def hold_reserve(self, in_flight: int) -> None:
        """Reserve disk space, so that replies in flight can be written when the disk fills up.

        Raises PartialError where there is not enough.
        """
        self._holds_reserve = True
        size = max(_MIN_RESERVE, in_flight * _RESERVE_PER_REPLY)
        try:
            allocate(self._reserve, size)
        except OSError as error:
            self._reserve.unlink(missing_ok=True)
            raise PartialError(
                f"not enough disk space beside {self.path} ({error.strerror})",
                hint="free some space or pass --out, then run the same command: nothing was sent",
            ) from None

    def put(
        self, key: str, max_tokens: int, endpoint: str, model: str | None, sample: int, reply: Reply
    ) -> None:
        """Commit one reply. Raises PartialError for a full disk; the reserve still holds it."""
        self._db.execute(
            "INSERT OR IGNORE INTO wasted SELECT key, -max_tokens, 'asked again', finish_reason,"
            " prompt_tokens, completion_tokens, cached_tokens, lane, raw, created FROM replies"
            " WHERE key = ? AND max_tokens = ?",
            (key, max_tokens),
        )
        row = (
            key, max_tokens, sample, endpoint, model, reply.text, reply.finish_reason,
            reply.prompt_tokens, reply.completion_tokens, reply.reasoning, reply.cached_tokens,
            reply.lane, reply.seconds, reply.raw, now(),
        )  # fmt: skip
        self._commit(
            f"INSERT OR REPLACE INTO replies ({_COLUMNS}) VALUES ({', '.join('?' * len(row))})", row
        )

    def refuse(self, key: str, message: str) -> None:
        """Record that an endpoint will never answer this request: no later run asks again."""
        self._commit("INSERT OR REPLACE INTO refusals VALUES (?, ?, ?)", (key, message, now()))

    def fail(self, key: str, message: str) -> None:
        """Record why a request has no reply; the next run asks again."""
        self._commit("INSERT OR REPLACE INTO failures VALUES (?, ?, ?)", (key, message, now()))

    def waste(self, key: str, message: str, reply: Reply) -> None:
        """Commit a reply that is on the bill and holds no answer."""
        self._commit(
            "INSERT INTO wasted SELECT ?, 1 + coalesce(max(number), 0), ?, ?, ?, ?, ?, ?, ?, ?"
            " FROM wasted WHERE key = ?",
            (
                key, message, reply.finish_reason, reply.prompt_tokens, reply.completion_tokens,
                reply.cached_tokens, reply.lane, reply.raw, now(), key,
            ),
        )  # fmt: skip

    def merge(self, other: Path) -> int:
        """Copy what another store has and this one does not. Returns the number of replies."""
        ReplyStore(other).close()  # adds missing columns
        self._db.execute("ATTACH ? AS other", (str(other),))
        try:
            before = self._db.total_changes
            self._commit(
                f"INSERT OR IGNORE INTO replies ({_COLUMNS}) SELECT {_COLUMNS} FROM other.replies",
                (),
            )
            copied = self._db.total_changes - before
            for table in ("refusals", "failures", "wasted"):
                self._commit(f"INSERT OR IGNORE INTO {table} SELECT * FROM other.{table}", ())
        finally:
            self._db.execute("DETACH other")
        return copied

    def _commit(self, statement: str, values: Sequence[object]) -> None:
        try:
            self._db.execute(statement, values)
        except sqlite3.OperationalError as error:
            if not _is_full(error) or not self._holds_reserve:
                raise self._full(error) from None
            # the freed space is for replies, not for checkpoints of earlier ones
            self._db.execute("PRAGMA wal_autocheckpoint=0")
            self._release_reserve()
            self._commit(statement, values)
            raise self._full(error) from None

    def _full(self, error: sqlite3.Error) -> PartialError:
        return PartialError(
            f"the disk of {self.path} cannot be written ({error})",
            hint="free some space, then run the same command: the replies so far are stored",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        for db in self._readable():
            db.close()
        self._release_reserve()

    def _release_reserve(self) -> None:
        if self._holds_reserve:
            self._holds_reserve = False
            self._reserve.unlink(missing_ok=True)


class Refusals:
    """Refused requests of a run.

    A refusal that the table of faults does not know may be the row's fault or everybody's. It is
    ``pending``, and stored once the endpoint has answered a request that was sent later.
    """

    def __init__(self, store: ReplyStore) -> None:
        self._store = store
        self.messages: dict[str, str] = {}  # by the request's key
        self.pending: dict[str, int] = {}  # the number of requests sent when it came
        self.last = ""
        self.number = 0  # without those of a content filter
        self.flagged = 0
        self.in_a_row = 0  # of one message, and pending
        self.limit = REFUSALS_IN_A_ROW
        self._form = ""

    def add(self, key: str, error: RejectedError, sent: int) -> None:
        self.last = str(error)
        self.messages[key] = self.last
        if error.blame == "content":
            self.flagged += 1
        else:
            self.number += 1
        if error.blame in ("content", "row") or self._store.refusal([key]) is not None:
            self._store.refuse(key, self.last)
            return
        self.pending[key] = sent
        form = re.sub(r"\d+", "0", self.last)
        self.in_a_row = self.in_a_row + 1 if form == self._form else 1
        self._form = form

    def confirm(self, started: int) -> None:
        """The endpoint has answered the request with this number."""
        self.in_a_row = 0
        for key in [key for key, sent in self.pending.items() if sent < started]:
            self._store.refuse(key, self.messages[key])
            del self.pending[key]

    def confirm_all(self) -> None:
        self.confirm(sys.maxsize)

    def error(self, *, has_answered: bool) -> DsbsError:
        """The error for an endpoint that refuses every request; none is kept as refused."""
        for key in self.pending:
            self._store.fail(key, self.messages[key])
        if has_answered:
            return PartialError(
                "the teacher refuses one request after the other, for no fault of the rows: "
                f"{self.last}",
                hint="run the same command again when that is settled: these rows were not kept as "
                "refused",
            )
        return UserError(
            f"the teacher refuses every request: {self.last}",
            hint="check teacher.model and annotate.max_tokens; teacher.extra_body adds, changes or "
            "(null) drops fields",
        )


def _is_answer(reply: Reply, budget: int, max_tokens: int) -> bool:
    """Whether a stored reply answers a request with ``max_tokens``."""
    how = ending(reply.finish_reason)
    if how == "broken off" or (how == "cut" and budget < max_tokens):
        return False
    was_generated = reply.completion_tokens != 0 or reply.prompt_tokens != 0
    return bool(reply.text) or was_generated


def _is_full(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
