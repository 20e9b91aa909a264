"""Human teacher: the rationales that a data set brings along, with its gold labels."""

from __future__ import annotations

from dsbs.annotation.annotator import Annotator
from dsbs.annotation.backends import Reply
from dsbs.annotation.backends.recorded import RecordedTeacher
from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.records.rows import Example


class HumanTeacher(RecordedTeacher):
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
