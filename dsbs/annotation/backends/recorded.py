"""Completions that already lie on disk, read as if they had just arrived."""

from __future__ import annotations

import sqlite3

from dsbs.annotation.backends.base import Reply
from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.files import find_file, read_jsonl
from dsbs.records.rows import Example


class RecordedTeacher:
    """``teacher.completions`` (a file of {id, completion}), else each row's own ``teacher.completion``."""

    def __init__(self, recipe: Recipe) -> None:
        self._by_id: sqlite3.Connection | None = None
        if recipe.teacher.completions is None:
            return
        path = find_file(
            recipe.teacher.completions,
            what="completions file",
            hint="check teacher.completions",
            beside=recipe.folder,
        )
        self._by_id = sqlite3.connect(
            "", isolation_level=None
        )  # a temporary file that goes with the connection
        self._by_id.execute("PRAGMA synchronous=OFF")
        self._by_id.execute(
            "CREATE TABLE completions (id TEXT PRIMARY KEY, completion TEXT) WITHOUT ROWID"
        )
        self._by_id.execute("BEGIN")
        for number, row in read_jsonl(path):
            if not isinstance(row.get("completion"), str) or row.get("id") is None:
                raise UserError(
                    f"{path}:{number}: not a row of id and completion",
                    hint='{"id": "…", "completion": "…"}',
                )
            try:
                self._by_id.execute(
                    "INSERT INTO completions VALUES (?, ?)", (str(row["id"]), row["completion"])
                )
            except sqlite3.IntegrityError:
                raise UserError(
                    f"{path}:{number}: id {str(row['id'])!r} occurs twice",
                    hint="keep one of the rows",
                ) from None
        self._by_id.execute("COMMIT")

    def recall(self, example: Example) -> Reply | None:
        if self._by_id is None:
            return None if example.completion is None else Reply(text=example.completion)
        found = self._by_id.execute(
            "SELECT completion FROM completions WHERE id = ?", (example.id,)
        ).fetchone()
        return None if found is None else Reply(text=found[0])
