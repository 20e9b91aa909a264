"""Completions that already lie on disk, read as if they had just arrived."""

from __future__ import annotations

from dsbs.annotate.teachers.base import Reply
from dsbs.artefacts import find, read_jsonl
from dsbs.errors import UserError
from dsbs.recipe import Recipe
from dsbs.records import Example


class RecordedTeacher:
    """``teacher.completions`` (a file of {id, completion}), else each row's own ``teacher.completion``."""

    def __init__(self, recipe: Recipe) -> None:
        self._by_id: dict[str, str] | None = None
        if recipe.teacher.completions is None:
            return
        path = find(recipe.teacher.completions, what="completions file", hint="check teacher.completions", beside=recipe.folder)
        self._by_id = {}
        for number, row in read_jsonl(path):
            if not isinstance(row.get("completion"), str) or row.get("id") is None:
                raise UserError(f"{path}:{number}: not a row of id and completion", hint='{"id": "…", "completion": "…"}')
            row_id = str(row["id"])
            if row_id in self._by_id:
                raise UserError(f"{path}:{number}: id {row_id!r} occurs twice", hint="keep one of the rows")
            self._by_id[row_id] = row["completion"]

    def recall(self, example: Example) -> Reply | None:
        text = example.completion if self._by_id is None else self._by_id.get(example.id)
        return None if text is None else Reply(text=text)
