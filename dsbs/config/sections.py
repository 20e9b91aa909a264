"""What all sections of a recipe share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

LabelSource = Literal["gold", "teacher"]


def as_tuple(value: Any) -> Any:
    """One value where several may stand."""
    return (value,) if isinstance(value, str | int | float) else value


def scalar_text(value: Any) -> Any:
    """A label that YAML reads as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), validate_default=True
    )


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Sentence for a name that is not there: the nearest one, and all there are."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{guess} (there are: {', '.join(known)})"
