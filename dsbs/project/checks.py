"""What ``dsbs doctor`` says: one check, one line, and what to do where it is not well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from dsbs.errors import DsbsError

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Check:
    """``name`` is what was looked at, ``said`` what was found there, ``hint`` what to do about it (None: nothing)."""

    name: str
    status: Status
    said: str
    hint: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "status": self.status, "said": self.said, "hint": self.hint}


def run(name: str, check: Callable[[], Iterator[Check]]) -> list[Check]:
    """The lines of one check. What breaks the check itself, on a machine that is broken in its own way, is a line as well."""
    found: list[Check] = []
    try:
        found.extend(check())
    except DsbsError as error:
        found.append(Check(name, "problem", error.problem, error.hint))
    except Exception as error:
        said = f"this check failed itself ({type(error).__name__}: {str(error)[:300]})"
        found.append(Check(name, "problem", said, "see whether what it looks at works by itself"))
    return found
