"""Errors: one tree; a message says what is wrong, where, and what to do. Anything else is a bug.

DsbsError            1  the environment failed: unreachable teacher, full disk
├── UserError        2  wrong usage, recipe or data
├── PartialError     3  stopped before the end; the same command continues
└── GateError        4  everything is done, and the result is below the requested gate
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DsbsError(Exception):
    """A failure with a message for the user.

    ``problem`` says what is wrong and where, ``hint`` what to do. ``exit_code`` is the exit
    status of the command.
    """

    exit_code = 1

    def __init__(self, problem: str, *, hint: str) -> None:
        super().__init__(f"{problem}\n  try: {hint}")
        self.problem = problem
        self.hint = hint


class UserError(DsbsError):
    """Wrong usage, recipe or data: the user can fix it. Exit code 2."""

    exit_code = 2


class PartialError(DsbsError):
    """Work stopped before its end and everything done so far is kept. Exit code 3."""

    exit_code = 3


class GateError(DsbsError):
    """A result is below a gate that the caller set; all files are written. Exit code 4."""

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
