"""Classification of your own data: a closed set of labels, any columns as input."""

from __future__ import annotations

from typing import Any

from dsbs.config import TaskSection
from dsbs.errors import UserError
from dsbs.records import Unreadable
from dsbs.tasks import Fields
from dsbs.tasks.label_set import LabelSet
from dsbs.tasks.own_data import OwnDataTask

_MAX_SHOWN = 12  # labels in one message


class Classification(OwnDataTask):
    def __init__(self, section: TaskSection) -> None:
        super().__init__(section)
        assert section.labels is not None  # checked by the recipe
        self._label_set = LabelSet(section.labels)

    @property
    def label_set(self) -> LabelSet:
        return self._label_set

    def gold(self, value: Any, fields: Fields, where: str) -> str:
        label = self.label_set.of_value(value)
        if label is not None:
            return label
        if isinstance(value, float):
            raise UserError(
                f"{where}: the number {value} does not match exactly one of the labels "
                f"{self._listing()}",
                hint="write the label as text, in quotes, as task.labels spells it",
            )
        raise UserError(
            f"{where}: label {str(value)[:60]!r} is not one of {self._listing()}",
            hint="fix the row, or add the label to task.labels",
        )

    def read_label(self, text: str, fields: Fields) -> str | Unreadable:
        return self.label_set.read(text)

    def _listing(self) -> str:
        labels = self.label_set.labels
        shown = ", ".join(labels[:_MAX_SHOWN])
        if len(labels) > _MAX_SHOWN:
            shown += f" and {len(labels) - _MAX_SHOWN} more"
        return shown
