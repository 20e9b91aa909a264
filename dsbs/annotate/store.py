"""Every paid reply, raw, in SQLite, committed before it is used."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsbs.annotate.teachers.base import Reply, Request
from dsbs.artefacts import canonical, digest, now
from dsbs.errors import PartialError, UserError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT NOT NULL,               -- of the request: see request_key
    max_tokens INTEGER NOT NULL,     -- the budget it was asked with; a reply cut by it does not answer a larger one
    sample INTEGER NOT NULL,
    endpoint TEXT NOT NULL,
    model TEXT,
    text TEXT NOT NULL,
    finish_reason TEXT,
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    reasoning TEXT,                  -- a reasoning model's text beside the visible one
    raw TEXT NOT NULL,               -- the whole reply as JSON
    created TEXT NOT NULL,
    PRIMARY KEY (key, max_tokens)
)
"""
_BUDGET = ("max_tokens", "max_completion_tokens")


def request_key(request: Request, identity: str) -> str:
    """Key of a reply: all of the request body but its token budget, the endpoint, and which sample it is."""
    body = {name: value for name, value in request.body.items() if name not in _BUDGET}
    return digest(canonical(body), identity, str(request.sample))


def budget(body: Mapping[str, Any]) -> int:
    return next((int(body[name]) for name in _BUDGET if isinstance(body.get(name), int)), 0)


class ReplyStore:
    """``annotate/replies.sqlite``. One process writes; anybody may read while it does (WAL)."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            # A commit survives the death of this process; only a power cut can take the last few.
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path} cannot be opened ({error})", hint="move the file away, or pass --out") from None

    def get(self, key: str, max_tokens: int) -> Reply | None:
        """The reply kept under ``key``, unless a smaller budget cut it short. ``raw`` is not read back."""
        row = self._db.execute(
            "SELECT text, finish_reason, prompt_tokens, completion_tokens, reasoning FROM replies"
            " WHERE key = ? AND (finish_reason IS NOT 'length' OR max_tokens >= ?) ORDER BY max_tokens DESC LIMIT 1",
            (key, max_tokens),
        ).fetchone()
        return None if row is None else Reply(*row)

    def put(self, key: str, max_tokens: int, endpoint: str, model: str | None, sample: int, reply: Reply) -> None:
        """Commit one reply. Raises PartialError where the disk is full."""
        try:
            self._db.execute(
                "INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    key,
                    max_tokens,
                    sample,
                    endpoint,
                    model,
                    reply.text,
                    reply.finish_reason,
                    reply.prompt_tokens,
                    reply.completion_tokens,
                    reply.reasoning,
                    json.dumps(reply.raw, ensure_ascii=False),
                    now(),
                ),
            )
        except sqlite3.OperationalError as error:
            raise PartialError(
                f"a reply cannot be written to {self.path} ({error})",
                hint="free some space, then run the same command: what was written before is kept",
            ) from None

    def close(self) -> None:
        self._db.close()
