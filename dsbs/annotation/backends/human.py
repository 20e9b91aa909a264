"""The rationales that a data set already has: its people are the teacher, its gold label is their answer."""

from __future__ import annotations

from dsbs.annotation.backends.base import Reply
from dsbs.config import Recipe
from dsbs.records.rows import Example


class HumanTeacher:
    def __init__(self, recipe: Recipe) -> None:
        del recipe  # there is nothing to set up

    def recall(self, example: Example) -> Reply | None:
        return None if example.rationale is None else Reply(text=example.rationale)
