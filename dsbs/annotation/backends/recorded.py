"""Teachers on disk: recorded completions, and the rationales that people wrote."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from typing import ClassVar

from dsbs.annotation.annotator import Annotator
from dsbs.annotation.backends import Reply, Teacher
from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.files import find_file
from dsbs.records import Annotation, Example, Provenance
from dsbs.tasks.data import id_text, numeric_id, respelled_ids
from dsbs.tasks.tables import read_table


class RecordedTeacher(Teacher):
    """``teacher.completions`` (rows of id and completion), else each row's ``teacher.completion``.

    Raises UserError for a file that is missing or has a row that is not such an object.
    """

    title = "recorded"
    is_asked = False
    provenance: ClassVar[Provenance] = "recorded"

    def __init__(self, recipe: Recipe) -> None:
        self._annotator = Annotator(recipe)
        self._by_id: sqlite3.Connection | None = None
        if recipe.teacher.completions is None:
            return
        path = find_file(
            recipe.teacher.completions,
            what="completions file",
            hint="check teacher.completions",
            folder=recipe.folder,
        )
        # a temporary file that is deleted with the connection: the rows need not fit into memory
        self._by_id = sqlite3.connect("", isolation_level=None)
        self._path = path
        self._by_id.create_function("numeric_id", 1, numeric_id, deterministic=True)
        self._by_id.execute("PRAGMA synchronous=OFF")
        self._by_id.execute(
            "CREATE TABLE completions (id TEXT PRIMARY KEY, completion TEXT) WITHOUT ROWID"
        )
        self._by_id.execute("BEGIN")
        for where, row in read_table(path):
            row_id = id_text(row.get("id"), where)
            if not isinstance(row.get("completion"), str) or row_id is None:
                raise UserError(
                    f"{where}: a row needs an id and a completion",
                    hint='{"id": "…", "completion": "…"}',
                )
            try:
                self._by_id.execute(
                    "INSERT INTO completions VALUES (?, ?)", (row_id, row["completion"])
                )
            except sqlite3.IntegrityError:
                raise UserError(
                    f"{where}: id {row_id!r} occurs twice", hint="delete one of the rows"
                ) from None
        self._by_id.execute("COMMIT")

    def annotations(self, examples: Iterable[Example], _split: str) -> Iterator[Annotation]:
        for example in examples:
            yield self._annotator.annotate_reply(example, self.reply(example))

    def reply(self, example: Example) -> Reply | None:
        """The row's recorded reply; None: there is none."""
        completion = example.completion
        if self._by_id is not None:
            row = self._by_id.execute(
                "SELECT completion FROM completions WHERE id = ?", (example.id,)
            ).fetchone()
            if row is None:
                self._check_spelling(example.id)
            completion = None if row is None else row[0]
        if completion is None:
            return None
        return Reply(text=completion)

    def _check_spelling(self, row_id: str) -> None:
        """Raise UserError where the file has a row's id without its leading zeros."""
        assert self._by_id is not None
        self._by_id.execute("CREATE INDEX IF NOT EXISTS by_number ON completions (numeric_id(id))")
        row = self._by_id.execute(
            "SELECT id FROM completions WHERE numeric_id(id) = ?", (numeric_id(row_id),)
        ).fetchone()
        if row is not None:
            raise respelled_ids(self._path, row_id, row[0])

    def no_annotations(self) -> UserError:
        where = "teacher.completion in the rows, or the file teacher.completions"
        return UserError(
            f"the data has no {where} for any row", hint="check teacher.kind and task.columns"
        )


class HumanTeacher(RecordedTeacher):
    """The rationales that a data set comes with, beside its gold labels."""

    title = "human"
    provenance = "human"

    def __init__(self, recipe: Recipe) -> None:
        self._annotator = Annotator(recipe)

    def reply(self, example: Example) -> Reply | None:
        if example.rationale is None:
            return None
        return Reply(text=example.rationale)

    def no_annotations(self) -> UserError:
        return UserError(
            "the data has no rationale column for any row",
            hint="check teacher.kind and task.columns",
        )
