"""Every paid reply, raw, in SQLite, committed before it is used."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from dsbs.annotation.backends.base import Reply, Request
from dsbs.errors import PartialError, UserError
from dsbs.files import canonical_json, digest, now

_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT NOT NULL,               -- of the request: see request_keys
    max_tokens INTEGER NOT NULL,     -- the budget it was asked with; a reply cut by it does not answer a larger one
    sample INTEGER NOT NULL,
    endpoint TEXT NOT NULL,
    model TEXT,
    text TEXT NOT NULL,
    finish_reason TEXT,
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    reasoning TEXT,                  -- a reasoning model's text beside the visible one
    raw TEXT NOT NULL,               -- the whole reply as it came
    created TEXT NOT NULL,
    cached_tokens INTEGER,           -- of the prompt tokens, those out of the provider's cache
    lane TEXT NOT NULL DEFAULT 'online',  -- or 'batch'
    seconds REAL,                    -- from sending to receiving
    PRIMARY KEY (key, max_tokens)
);
CREATE TABLE IF NOT EXISTS refusals (key TEXT PRIMARY KEY, said TEXT NOT NULL, created TEXT NOT NULL);
"""
_ADDED = {
    "cached_tokens": "INTEGER",
    "lane": "TEXT NOT NULL DEFAULT 'online'",
    "seconds": "REAL",
}  # since the first stores
_REPLY = (
    "text, finish_reason, prompt_tokens, completion_tokens, reasoning, cached_tokens, lane, seconds"
)
_COLUMNS = f"key, max_tokens, sample, endpoint, model, {_REPLY}, raw, created"
_BUDGET = ("max_tokens", "max_completion_tokens")
_RESERVE_EACH = (
    32 << 10
)  # bytes kept free for each reply that may be in flight when the disk fills up


def request_keys(request: Request, identities: Sequence[str]) -> list[str]:
    """A reply's keys at several endpoints: all of the request body but its token budget, the endpoint, the sample."""
    body = canonical_json(
        {name: value for name, value in request.body.items() if name not in _BUDGET}
    )
    return [digest(body, identity, str(request.sample)) for identity in identities]


def budget(body: Mapping[str, Any]) -> int:
    return next((int(body[name]) for name in _BUDGET if isinstance(body.get(name), int)), 0)


class ReplyStore:
    """``annotate/replies.sqlite``. One process writes; anybody may read while it does (WAL).

    ``beside`` is another store that is looked into, and never written: a shard's run finds what the whole run has bought.
    """

    def __init__(self, path: Path, beside: Path | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._reserve = path.with_name(f".{path.name}.reserve")
        self._holds_reserve = False
        self._others: list[sqlite3.Connection] = []
        try:
            # one thread at a time uses it, not always the one that opened it
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            # A commit survives the death of this process; only a power cut can take the last few.
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
            there = {row[1] for row in self._db.execute("PRAGMA table_info(replies)")}
            for column, kind in _ADDED.items():
                if column not in there:
                    self._db.execute(f"ALTER TABLE replies ADD COLUMN {column} {kind}")
            if beside is not None and beside.is_file():
                ReplyStore(beside).close()  # brings an older one up to date
                self._others.append(
                    sqlite3.connect(
                        f"{beside.resolve().as_uri()}?mode=ro",
                        uri=True,
                        isolation_level=None,
                        check_same_thread=False,
                    )
                )
        except sqlite3.OperationalError as error:
            if _is_full(error):
                raise self._full(error) from None
            raise UserError(
                f"{path} cannot be opened ({error})",
                hint="check the folder's rights, or pass --out",
            ) from None
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{path} cannot be opened ({error})", hint="move the file away, or pass --out"
            ) from None

    # --- reading

    def find(
        self, keys: Sequence[str], max_tokens: int, *, raw: bool = False
    ) -> tuple[str, Reply] | None:
        """The first of ``keys`` with a reply, unless a smaller budget cut that short; ``raw`` is read back on demand."""
        columns = f"{_REPLY}, raw" if raw else _REPLY
        for db in (self._db, *self._others):
            for key in keys:
                row = db.execute(
                    f"SELECT {columns} FROM replies"
                    " WHERE key = ? AND (finish_reason IS NOT 'length' OR max_tokens >= ?) ORDER BY max_tokens DESC LIMIT 1",
                    (key, max_tokens),
                ).fetchone()
                if row is not None:
                    return key, Reply(*row)
        return None

    def is_refused(self, keys: Sequence[str]) -> bool:
        """Whether an endpoint has answered one of ``keys`` with a final no."""
        return any(
            db.execute("SELECT 1 FROM refusals WHERE key = ?", (key,)).fetchone()
            for db in (self._db, *self._others)
            for key in keys
        )

    def has_replies(self, endpoints: Sequence[str], model: str | None) -> bool:
        """Whether these endpoints have ever answered for this model."""
        question = f"SELECT 1 FROM replies WHERE model IS ? AND endpoint IN ({', '.join('?' * len(endpoints))}) LIMIT 1"
        return any(
            db.execute(question, (model, *endpoints)).fetchone() for db in (self._db, *self._others)
        )

    def typical_seconds(self, endpoints: Sequence[str], model: str | None) -> float | None:
        """Mean time of an online reply of these endpoints and this model so far."""
        found: float | None = self._db.execute(
            "SELECT avg(seconds) FROM replies WHERE lane = 'online' AND model IS ?"
            f" AND endpoint IN ({', '.join('?' * len(endpoints))})",
            (model, *endpoints),
        ).fetchone()[0]
        return found

    # --- writing

    def hold_reserve(self, in_flight: int) -> None:
        """Take the room that lets replies in flight be written when the disk fills up. Raises PartialError without room."""
        self._holds_reserve = True
        try:
            with self._reserve.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1 << 20, in_flight * _RESERVE_EACH))
        except OSError as error:
            self._reserve.unlink(missing_ok=True)
            raise PartialError(
                f"there is no room beside {self.path} ({error.strerror})",
                hint="free some space or pass --out, then run the same command: nothing was asked",
            ) from None

    def put(
        self, key: str, max_tokens: int, endpoint: str, model: str | None, sample: int, reply: Reply
    ) -> None:
        """Commit one reply. Raises PartialError where the disk is full; the reply is kept, out of the reserve."""
        row = (
            key, max_tokens, sample, endpoint, model, reply.text, reply.finish_reason, reply.prompt_tokens,
            reply.completion_tokens, reply.reasoning, reply.cached_tokens, reply.lane, reply.seconds, reply.raw, now(),
        )  # fmt: skip
        self._commit(
            f"INSERT OR REPLACE INTO replies ({_COLUMNS}) VALUES ({', '.join('?' * len(row))})", row
        )

    def refuse(self, key: str, said: str) -> None:
        """Keep that an endpoint will never answer this request, so that no later run asks again."""
        self._commit("INSERT OR REPLACE INTO refusals VALUES (?, ?, ?)", (key, said, now()))

    def take_in(self, other: Path) -> int:
        """Copy what another store has and this one lacks. Returns the number of replies taken."""
        ReplyStore(other).close()
        self._db.execute("ATTACH ? AS other", (str(other),))
        try:
            before = self._db.total_changes
            self._commit(
                f"INSERT OR IGNORE INTO replies ({_COLUMNS}) SELECT {_COLUMNS} FROM other.replies",
                (),
            )
            taken = self._db.total_changes - before
            self._commit("INSERT OR IGNORE INTO refusals SELECT * FROM other.refusals", ())
        finally:
            self._db.execute("DETACH other")
        return taken

    def _commit(self, statement: str, values: Sequence[object]) -> None:
        try:
            self._db.execute(statement, values)
        except sqlite3.OperationalError as error:
            if not _is_full(error) or not self._holds_reserve:
                raise self._full(error) from None
            self._db.execute(
                "PRAGMA wal_autocheckpoint=0"
            )  # the room is for replies, not for copying earlier ones
            self._release()
            self._commit(statement, values)
            raise self._full(error) from None

    def _full(self, error: sqlite3.Error) -> PartialError:
        return PartialError(
            f"the disk of {self.path} cannot be written ({error})",
            hint="free some space, then run the same command: what was bought is kept",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        for db in (self._db, *self._others):
            db.close()
        self._release()

    def _release(self) -> None:
        if self._holds_reserve:
            self._holds_reserve = False
            self._reserve.unlink(missing_ok=True)


def _is_full(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
    )
