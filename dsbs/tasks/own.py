"""Input of the two kinds of task that need no Python: any columns, joined by a template or by being the only one."""

from __future__ import annotations

from typing import Any

from dsbs.config import TaskSection
from dsbs.errors import UserError
from dsbs.tasks.base import RESERVED, Fields, Task, column_of, missing_column
from dsbs.tasks.templates import fields_of, render


def _plain(value: Any) -> Any:
    """A value that JSON knows; dates, decimals and the like of a parquet file as text."""
    if value is None:
        return ""
    return value if isinstance(value, str | int | float | bool | list | dict) else str(value)


class OwnDataTask(Task):
    def __init__(self, section: TaskSection) -> None:
        super().__init__(section)
        self._used = sorted(fields_of(section.input, where="task.input")) if section.input else None

    def fields(self, row: Fields, where: str) -> dict[str, Any]:
        if self._used is None:
            return {"text": self._only_text(row, where)}
        found = {}
        for field in self._used:
            column = column_of(row, (self.section.columns.get(field, field),))
            if column is None:
                raise missing_column(where, field, row)
            found[field] = row[column]
        if all(value is None or not str(value).strip() for value in found.values()):
            raise UserError(
                f"{where}: {', '.join(found)}: empty", hint="fill it in or remove the row"
            )
        return {field: _plain(value) for field, value in found.items()}

    def text(self, fields: Fields) -> str:
        if self.section.input is None:
            return str(fields["text"])
        return render(self.section.input, fields, where="task.input").strip()

    def view(self, fields: Fields, label: str | None = None) -> dict[str, Any]:
        """The fields, and ``text``: the same input that the student gets."""
        return super().view(fields, label) | {"text": self.text(fields)}

    def _only_text(self, row: Fields, where: str) -> str:
        taken = {name.casefold() for name in RESERVED} | {
            column.casefold() for field, column in self.section.columns.items() if field != "text"
        }
        named = self.section.columns.get("text")
        column = column_of(row, (named,) if named else ("text",))
        if column is None:
            free = [name for name in row if str(name).casefold() not in taken]
            if named or len(free) != 1:
                raise missing_column(where, named or "text", row)
            column = free[0]
        if row[column] is None or not str(row[column]).strip():
            raise UserError(f"{where}: {column} is empty", hint="fill it in or remove the row")
        return str(row[column])
