"""Tasks on a user's own data: the base of those whose input comes from ``task.input`` and
``task.columns``.
"""

from __future__ import annotations

import re
from typing import Any

from dsbs.config import TaskSection
from dsbs.config.task import RESERVED_COLUMNS
from dsbs.errors import UserError
from dsbs.tasks import (
    MISSING_WORDS,
    Fields,
    Task,
    cell_text,
    column_of,
    input_text,
    missing_column,
)
from dsbs.tasks.templates import fields_of, render

# Names of a data frame's index in files that pandas wrote.
_INDEX_COLUMN = re.compile(r"|index|Unnamed: \d+|__index_level_\d+__")


class OwnDataTask(Task):
    has_prompt_file = False

    def __init__(self, section: TaskSection) -> None:
        super().__init__(section)
        self._template_fields: list[str] | None = None
        if section.input:
            self._template_fields = sorted(fields_of(section.input, where="task.input"))
            for use in ("label", "rationale"):
                column = section.columns.get(use)
                if column is not None and column in self._template_fields:
                    raise UserError(
                        f"task.input reads the column {column!r}, which holds each row's {use}",
                        hint="the student would be given the answer: leave the column out",
                    )

    def fields(self, row: Fields, where: str) -> dict[str, Any]:
        if self._template_fields is None:
            return {"text": self._only_text(row, where)}
        fields = {}
        for field in self._template_fields:
            mapped = self.section.columns.get(field)
            column = column_of(row, (mapped or field,))
            if column is None:
                raise missing_column(where, field, row, mapped)
            fields[field] = row[column]
        plain = {field: _as_json(value, field, where) for field, value in fields.items()}
        if all(not str(value).strip() for value in plain.values()):
            raise UserError(
                f"{where}: {', '.join(plain)}: empty", hint="fill it in or remove the row"
            )
        if any(isinstance(value, list | dict) for value in plain.values()):
            try:
                self.text(plain)
            except UserError as error:
                raise UserError(f"{where}: {error.problem}", hint=error.hint) from None
        return plain

    def text(self, fields: Fields) -> str:
        if self.section.input is None:
            return str(fields["text"])
        return render(self.section.input, fields, where="task.input").strip()

    def template_variables(self, fields: Fields, label: str | None = None) -> dict[str, Any]:
        """The fields, and ``text``: the student's input."""
        return super().template_variables(fields, label) | {"text": self.text(fields)}

    def _only_text(self, row: Fields, where: str) -> str:
        mapped = self.section.columns.get("text")
        column = column_of(row, (mapped or "text",))
        if column is None:
            free = self._unassigned_columns(row)
            if mapped or len(free) != 1:
                raise missing_column(where, "text", row, mapped)
            column = free[0]
        return input_text(row[column], column, where)

    def _unassigned_columns(self, row: Fields) -> list[str]:
        """The columns that are not reserved, and not mapped to anything but the text."""
        assigned = {name.casefold() for name in RESERVED_COLUMNS}
        for field, column in self.section.columns.items():
            if field != "text":
                assigned.add(column.casefold())
        return [
            name
            for name in row
            if name.strip().casefold() not in assigned and not _INDEX_COLUMN.fullmatch(name)
        ]


def _as_json(value: Any, name: str, where: str) -> Any:
    """A value that JSON can hold: dates, decimals and the like become text, a missing cell ""."""
    if isinstance(value, dict):
        return {str(key): _as_json(item, name, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item, name, where) for item in value]
    text = cell_text(value, name, where)
    if text is None or text.strip() in MISSING_WORDS:
        return ""
    return value if isinstance(value, int | float) else text
