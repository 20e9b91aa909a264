"""What every task says about itself. A task is pure: it reads rows and text, and touches no file and no model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dsbs.config import TaskSection
from dsbs.errors import UserError
from dsbs.records.rows import Unread

Fields = Mapping[str, Any]

# Columns that are about a row and never part of its input.
RESERVED = ("id", "label", "rationale", "teacher", "meta", "input")
_WRAPPING = " \t\r\n*_`\"'“”‘’"


class Task:
    """One kind of task. Subclasses set the class attributes and override what differs."""

    inputs: ClassVar[
        dict[str, tuple[str, ...]]
    ] = {}  # canonical field -> other names that data sets give it
    optional: ClassVar[frozenset[str]] = frozenset()  # canonical fields that may be missing
    id_columns: ClassVar[tuple[str, ...]] = ("id",)
    label_columns: ClassVar[tuple[str, ...]] = ("label",)
    rationale_columns: ClassVar[tuple[str, ...]] = ("rationale",)
    needs_fields: ClassVar[bool] = (
        False  # whether a label is read by its row's fields, so that plain text is no input
    )
    no_label: ClassVar[tuple[str, ...]] = ("",)  # what an unlabelled row has in its label column

    def __init__(self, section: TaskSection) -> None:
        self.section = section
        self.name = section.name

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The closed set of labels, or None where answers are free or differ from row to row."""
        return None

    @property
    def is_free_text(self) -> bool:
        """Whether any text is an answer, so that two answers in other words may mean the same."""
        return False

    @property
    def is_equation(self) -> bool:
        """Whether an answer is an equation, whose value may be right where its text is another."""
        return False

    def fields(self, row: Fields, where: str) -> dict[str, Any]:
        """The canonical input fields of a raw row. Raises UserError naming a missing column."""
        found = {}
        for field, others in self.inputs.items():
            names = (
                (self.section.columns[field],)
                if field in self.section.columns
                else (field, *others)
            )
            column = column_of(row, names)
            if column is None:
                if field in self.optional:
                    continue
                raise missing_column(where, field, row)
            found[field] = row[column]
        return self.check_fields(found, row, where)

    def check_fields(self, found: dict[str, Any], row: Fields, where: str) -> dict[str, Any]:
        """Last word on the input fields: text must be text."""
        for field, value in found.items():
            if value is None or (isinstance(value, str) and not value.strip()):
                raise UserError(f"{where}: {field} is empty", hint="fill it in or remove the row")
            if not isinstance(value, str):
                found[field] = str(value)
        return found

    def gold(self, value: Any, fields: Fields, where: str) -> str:
        """A row's own label in canonical form. Raises UserError where it is none of the task's."""
        return str(value).strip()

    def text(self, fields: Fields) -> str:
        """The student's input, without any task prefix."""
        raise NotImplementedError

    def view(self, fields: Fields, label: str | None = None) -> dict[str, Any]:
        """What a prompt's templates see of an example: its fields and, for an exemplar, its label."""
        return dict(fields) | ({} if label is None else {"label": label})

    def read_label(self, text: str, fields: Fields) -> str | Unread:
        """The label that ``text`` states, in canonical form, or why there is none. Never looks at the gold label.

        ``text`` is what follows the answer anchor in a teacher's turn, or the whole of a student's output.
        """
        raise NotImplementedError

    def correct(self, predicted: str, gold: str) -> bool:
        """Whether two canonical labels say the same."""
        return predicted == gold


def column_of(row: Fields, names: Sequence[str]) -> str | None:
    """The row's column that bears one of ``names`` (exact before case-insensitive; earlier names first)."""
    folded = {str(column).casefold(): column for column in row}
    for name in names:
        if name in row:
            return name
        if name.casefold() in folded:
            return str(folded[name.casefold()])
    return None


def missing_column(where: str, field: str, row: Fields) -> UserError:
    columns = (
        ", ".join(str(column) for column in row if column not in ("teacher", "meta")) or "none"
    )
    return UserError(
        f"{where}: no column {field!r} (columns: {columns})",
        hint=f"rename the column, or say which one it is: task.columns: {{{field}: <column>}}",
    )


def tidy(text: str) -> str:
    """An answer without the wrapping that models add: space, quotes, Markdown emphasis, a closing full stop."""
    text = text.strip(_WRAPPING)
    return text.rstrip(".!;,:").strip(_WRAPPING)


def first_line(text: str) -> str:
    """The first line that holds more than space and Markdown marks."""
    return next((line for line in text.split("\n") if line.strip(_WRAPPING)), "")


def read_closed(text: str, labels: Sequence[str]) -> str | Unread:
    """The one label of a closed set that an answer states.

    The whole first line may be the label; otherwise exactly one label must be named in it, as a whole word and not
    negated. A beginning of a label at the end of the text was cut off.
    """
    line = first_line(text)
    answer = tidy(line)
    by_fold = {fold(label): label for label in labels}
    for whole in (line.strip(_WRAPPING), answer):  # punctuation may belong to a label ("U.S.")
        if fold(whole) in by_fold:
            return by_fold[fold(whole)]
    if not answer:
        return Unread("empty")
    named: set[str] = set()
    rest = fold(answer).replace("’", "'")
    for label in sorted(
        by_fold, key=len, reverse=True
    ):  # longest first: "card" must not be seen in "card fraud"
        pattern = re.compile(rf"(?<![\w-]){re.escape(label)}(?!\w)")
        for match in pattern.finditer(rest):
            if not re.search(
                r"(\bnot|\bneither|\bnor|n't|\bnever|\brather than|\binstead of)\s+(an?\s+|the\s+)?$",
                rest[: match.start()],
            ):
                named.add(by_fold[label])
        rest = pattern.sub(lambda m: "\0" * len(m.group()), rest)
    if len(named) == 1:
        return named.pop()
    if named:
        return Unread("several-answers", answer)
    if text.rstrip(" *_`\"'").endswith(line.rstrip(" *_`\"'")) and any(
        lab.startswith(fold(answer)) for lab in by_fold
    ):
        return Unread("truncated", answer)
    return Unread("label-outside-set", answer)


def fold(text: str) -> str:
    """Text for comparison: case and runs of white space do not matter."""
    return " ".join(text.split()).casefold()
