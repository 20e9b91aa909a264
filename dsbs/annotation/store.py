"""Reply store: every paid reply, raw, in SQLite, committed before it is used."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from dsbs.annotation.backends import Endpoint, Reply, Request
from dsbs.annotation.backends.adaptation import Adaptation, Change
from dsbs.annotation.backends.faults import ending, is_final, plain_ending
from dsbs.errors import PartialError, UserError
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
CREATE TABLE IF NOT EXISTS adaptations (
    endpoint TEXT NOT NULL,
    model TEXT NOT NULL,
    name TEXT NOT NULL,              -- of a parameter that the endpoint refuses for the model
    replacement TEXT NOT NULL,       -- its name or value instead; empty: it is left out
    created TEXT NOT NULL,
    PRIMARY KEY (endpoint, model, name, replacement)
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


def request_key(body: Mapping[str, Any], identity: str, sample: int) -> str:
    """The key of the reply to a request at an endpoint.

    It covers the whole body as it is sent, except the token budget; the endpoint; and the sample's
    index.
    """
    keyed = {name: value for name, value in body.items() if name not in _BUDGET_FIELDS}
    return digest(canonical_json(keyed), identity, str(sample))


@dataclass(frozen=True, slots=True)
class RequestKeys:
    """The keys of a request's replies.

    ``now``: at each endpoint, in the form in which it would be sent to it. ``earlier``: in the
    forms before something in them was refused.
    """

    now: list[str]
    earlier: list[str]

    @property
    def all(self) -> list[str]:
        return self.now + self.earlier


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
        self._adaptations: dict[tuple[str, str], Adaptation] = {}
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

    @property
    def is_empty(self) -> bool:
        """Whether it has no reply."""
        return self._db.execute("SELECT 1 FROM replies LIMIT 1").fetchone() is None

    def look_up(self, keys: RequestKeys, max_tokens: int, *, raw: bool = False) -> Stored:
        """What there is for a request. A reply that broke off, or that a smaller budget cut, is no
        answer.

        ``Reply.raw`` is read only where ``raw`` is set.
        """
        columns = f"{_REPLY}, raw" if raw else _REPLY
        query = f"SELECT max_tokens, {columns} FROM replies WHERE key = ? ORDER BY max_tokens DESC"
        answer: tuple[str, Reply] | None = None
        wasted: list[Reply] = []
        for db in self._readable():
            for key in keys.all:
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
        failure = self._said("failures", keys.now)
        return Stored(keys.now[0], None, tuple(wasted), self.refusal(keys.now), failure)

    def keys(self, request: Request, identities: Sequence[str]) -> RequestKeys:
        """The keys of a request's replies at the endpoints."""
        current = []
        earlier = []
        for identity in identities:
            adaptation = self.adaptation(identity, request.body.get("model"))
            present, *past = adaptation.forms(request.body)
            current.append(request_key(present, identity, request.sample))
            earlier += [request_key(form, identity, request.sample) for form in past]
        return RequestKeys(current, earlier)

    def adaptation(self, endpoint: str, model: str | None) -> Adaptation:
        """How an endpoint's requests for a model are adapted: one object, which may still learn."""
        key = (endpoint, str(model))
        if key not in self._adaptations:
            changes: dict[Change, None] = {}
            for db in self._readable():
                for name, replacement in db.execute(
                    "SELECT name, replacement FROM adaptations WHERE endpoint = ? AND model = ?"
                    " ORDER BY rowid",
                    key,
                ):
                    changes[Change(name, replacement or None)] = None
            self._adaptations[key] = Adaptation(tuple(changes))
        return self._adaptations[key]

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

    def has_reply(self, key: str, raw: str) -> bool:
        """Whether this very reply to a request is stored, as an answer or as one without."""
        query = (
            "SELECT 1 FROM replies WHERE key = ? AND raw = ?"
            " UNION SELECT 1 FROM wasted WHERE key = ? AND raw = ?"
        )
        values = (key, raw, key, raw)
        return any(db.execute(query, values).fetchone() for db in self._readable())

    def has_replies(self, endpoints: Sequence[str], model: str | None) -> bool:
        """Whether these endpoints have ever answered for this model."""
        marks = ", ".join("?" * len(endpoints))
        query = f"SELECT 1 FROM replies WHERE model IS ? AND endpoint IN ({marks}) LIMIT 1"
        return any(db.execute(query, (model, *endpoints)).fetchone() for db in self._readable())

    def mean_completion_tokens(self, endpoints: Sequence[str], model: str | None) -> float | None:
        """Mean completion tokens of these endpoints' replies for this model; None: not counted."""
        marks = ", ".join("?" * len(endpoints))
        mean: float | None = self._db.execute(
            "SELECT avg(completion_tokens) FROM replies"
            f" WHERE model IS ? AND endpoint IN ({marks})",
            (model, *endpoints),
        ).fetchone()[0]
        return mean

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
        size = max(_MIN_RESERVE, in_flight * _RESERVE_PER_REPLY)
        try:
            self._holds_reserve = True
            allocate(self._reserve, size)
        except OSError as error:
            self._release_reserve()
            raise PartialError(
                f"not enough disk space beside {self.path} ({error.strerror})",
                hint="free some space or pass --out, then run the same command: nothing was sent",
            ) from None

    @property
    def holds_reserve(self) -> bool:
        """Whether a reply will find space on the disk."""
        return self._holds_reserve

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

    def adapt(self, endpoint: Endpoint, model: str | None, say: Callable[[str], None]) -> None:
        """Let an endpoint begin with the form that it accepted before; keep what it learns."""
        endpoint.adaptation = self.adaptation(endpoint.identity, model)
        for change in endpoint.adaptation.changes:
            say(f"{endpoint.name}: {change}, as in an earlier command")

        def keep(change: Change) -> None:
            self._commit(
                "INSERT OR IGNORE INTO adaptations VALUES (?, ?, ?, ?, ?)",
                (endpoint.identity, str(model), change.name, change.replacement or "", now()),
            )
            say(f"{endpoint.name} does not take {change.name}: {change} from now on")

        endpoint.adaptation.on_change = keep

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
            self._commit(
                "INSERT OR IGNORE INTO adaptations SELECT * FROM other.adaptations ORDER BY rowid",
                (),
            )
            self._adaptations.clear()
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
