"""Teacher backends. Each is named here and imported only when a recipe asks for it."""

from __future__ import annotations

from typing import Any

from dsbs.config import Recipe
from dsbs.config.registry import TEACHERS, entry, module_of

ARCHIVES = ("recorded", "human", "ensemble")  # read from disk: nothing is sent and nothing kept


def make_teacher(recipe: Recipe) -> Any:
    """The recipe's Teacher, or Archive or EnsembleTeacher for the kinds that read what is on disk. Raises UserError."""
    return entry(TEACHERS, recipe.teacher.kind)(recipe)


def is_asked(kind: str) -> bool:
    """Whether a kind of teacher is sent requests (and its replies kept), rather than read from disk."""
    return kind not in ARCHIVES


def in_flight(recipe: Recipe) -> int:
    """How many requests a teacher that is asked answers side by side, at most, without making it."""
    most: int = module_of(TEACHERS, recipe.teacher.kind).in_flight(recipe)
    return min(most, recipe.annotate.concurrency)


def identities(recipe: Recipe) -> list[str]:
    """What the endpoints of a teacher that is asked are called in their replies' keys, without connecting to any."""
    found: list[str] = module_of(TEACHERS, recipe.teacher.kind).identities(recipe)
    return found
