"""Classification of your own data: a closed set of labels, any columns as input."""

from __future__ import annotations

from typing import Any

from dsbs.errors import UserError
from dsbs.records import Unread
from dsbs.tasks import Fields, OwnDataTask, fold, read_closed


class Classification(OwnDataTask):
    @property
    def labels(self) -> tuple[str, ...]:
        assert self.section.labels is not None  # checked by the recipe
        return self.section.labels

    def gold(self, value: Any, fields: Fields, where: str) -> str:
        for label in self.labels:
            if fold(label) == fold(str(value)):
                return label
        raise UserError(
            f"{where}: label {str(value)[:60]!r} is not one of {', '.join(self.labels)}",
            hint="fix the row, or add the label to task.labels",
        )

    def read_label(self, text: str, fields: Fields) -> str | Unread:
        return read_closed(text, self.labels)
