"""Recipe sections: their base class and the helpers that all of them use."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

LabelSource = Literal["gold", "teacher"]


class Section(BaseModel):
    """A closed and frozen section. The docstring below each field documents its key."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        use_attribute_docstrings=True,
        validate_default=True,
    )


def as_tuple(value: Any) -> Any:
    """A single value where a list is allowed, as a tuple of one."""
    return (value,) if isinstance(value, str | int | float) else value


def scalar_text(value: Any) -> Any:
    """A label that YAML reads as a number, as text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value


def unknown(kind: str, name: str, names: Iterable[str]) -> str:
    """A sentence about an unknown name: the nearest known one, and all known ones."""
    names = list(names)
    guess = ""
    for near in difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        guess = f"; did you mean {near!r}?"
    return f"unknown {kind} {name!r}{guess} (known: {', '.join(names)})"
