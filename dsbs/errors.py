"""Errors: one root, whose message says what is wrong, where, and what to do.

Anything else that escapes is a bug.

DsbsError            1  something outside failed: an unreachable teacher, a full disk
├── UserError        2  wrong usage, recipe or data
├── PartialError     3  stopped before the end; the same command continues
└── GateError        4  finished, but the outcome is below a requested threshold
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


class DsbsError(Exception):
    """A failure with a message for the user.

    ``problem`` says what is wrong and where, ``hint`` what to do; ``exit_code`` is the command's
    exit status.
    """

    exit_code = 1

    def __init__(self, problem: str, *, hint: str) -> None:
        super().__init__(f"{problem}\n  try: {hint}")
        self.problem = problem
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes: by default an exception is made again without its keywords."""
        return partial(type(self), hint=self.hint), (self.problem,)


class UserError(DsbsError):
    """Wrong usage, recipe or data, which the user can fix. Exit code 2."""

    exit_code = 2


class PartialError(DsbsError):
    """Work stopped before its end; everything done so far is kept. Exit code 3."""

    exit_code = 3


class GateError(DsbsError):
    """A result is below a gate that the caller set; every file is written all the same. Exit code
    4.
    """

    exit_code = 4


@contextmanager
def needs_extra(extra: str, feature: str) -> Iterator[None]:
    """Imports in the body need an optional dependency: ``with needs_extra("lora", "train.lora"):``.

    Raises UserError with the ``pip install`` command where a package is missing.
    """
    try:
        yield
    except ImportError as error:
        package = error.name or str(error)
        raise UserError(
            f"{feature} needs the package {package}", hint=f"pip install 'dsbs[{extra}]'"
        ) from None
