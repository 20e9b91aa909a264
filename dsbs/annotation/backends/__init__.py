"""Teacher backends. Each is named here and imported only when a recipe asks for it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dsbs.config import Recipe

TEACHERS = {
    "openai": "dsbs.annotation.backends.openai:OpenAITeacher",
    "llamacpp": "dsbs.annotation.backends.llamacpp:LlamaCppTeacher",
    "transformers": "dsbs.annotation.backends.transformers:TransformersTeacher",
    "recorded": "dsbs.annotation.backends.recorded:RecordedTeacher",
    "human": "dsbs.annotation.backends.human:HumanTeacher",
    "ensemble": "dsbs.annotation.backends.ensemble:EnsembleTeacher",
}
ARCHIVES = ("recorded", "human", "ensemble")  # read from disk: nothing is sent and nothing kept


def make_teacher(recipe: Recipe) -> Any:
    """The recipe's Teacher, or Archive or EnsembleTeacher for the kinds that read what is on disk. Raises UserError."""
    module, _, name = TEACHERS[recipe.teacher.kind].partition(":")
    return getattr(import_module(module), name)(recipe)


def is_asked(kind: str) -> bool:
    """Whether a kind of teacher is sent requests (and its replies kept), rather than read from disk."""
    return kind not in ARCHIVES


def in_flight(recipe: Recipe) -> int:
    """How many requests a teacher that is asked answers side by side, at most, without making it."""
    module, _, _ = TEACHERS[recipe.teacher.kind].partition(":")
    most: int = import_module(module).in_flight(recipe)
    return min(most, recipe.annotate.concurrency)


def identities(recipe: Recipe) -> list[str]:
    """What the endpoints of a teacher that is asked are called in their replies' keys, without connecting to any."""
    module, _, _ = TEACHERS[recipe.teacher.kind].partition(":")
    found: list[str] = import_module(module).identities(recipe)
    return found
