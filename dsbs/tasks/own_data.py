"""Input of tasks for your own data: columns joined by a template, or the only text column."""

from __future__ import annotations

from typing import Any

from dsbs.config import TaskSection
from dsbs.errors import UserError
from dsbs.tasks.base import RESERVED, Fields, Task, column_of, missing_column
from dsbs.tasks.templates import fields_of, render


class OwnDataTask(Task):
    """Base of the tasks whose input comes from ``task.input`` and ``task.columns``."""

    def __init__(self, section: TaskSection) -> None:
        super().__init__(section)
        self._template_fields: list[str] | None = None
        if section.input:
            self._template_fields = sorted(fields_of(section.input, where="task.input"))

    def fields(self, row: Fields, where: str) -> dict[str, Any]:
        if self._template_fields is None:
            return {"text": self._only_text(row, where)}
        fields = {}
        for field in self._template_fields:
            column = column_of(row, (self.section.columns.get(field, field),))
            if column is None:
                raise missing_column(where, field, row)
            fields[field] = row[column]
        if all(value is None or not str(value).strip() for value in fields.values()):
            raise UserError(
                f"{where}: {', '.join(fields)}: empty", hint="fill it in or remove the row"
            )
        return {field: _as_json(value) for field, value in fields.items()}

    def text(self, fields: Fields) -> str:
        if self.section.input is None:
            return str(fields["text"])
        return render(self.section.input, fields, where="task.input").strip()

    def view(self, fields: Fields, label: str | None = None) -> dict[str, Any]:
        """The fields, and ``text``: the student's input."""
        return super().view(fields, label) | {"text": self.text(fields)}

    def _only_text(self, row: Fields, where: str) -> str:
        mapped = self.section.columns.get("text")
        column = column_of(row, (mapped or "text",))
        if column is None:
            free = self._unassigned_columns(row)
            if mapped or len(free) != 1:
                raise missing_column(where, mapped or "text", row)
            column = free[0]
        if row[column] is None or not str(row[column]).strip():
            raise UserError(f"{where}: {column} is empty", hint="fill it in or remove the row")
        return str(row[column])

    def _unassigned_columns(self, row: Fields) -> list[str]:
        """The columns that are not reserved, and not mapped to anything but the text."""
        assigned = {name.casefold() for name in RESERVED}
        for field, column in self.section.columns.items():
            if field != "text":
                assigned.add(column.casefold())
        return [name for name in row if str(name).casefold() not in assigned]


def _as_json(value: Any) -> Any:
    """A value that JSON can hold: dates, decimals and the like of a parquet file become text."""
    if value is None:
        return ""
    if isinstance(value, str | int | float | bool | list | dict):
        return value
    return str(value)
