"""Tasks: inputs and labels, how labels are parsed from text, and when two labels are equal.

A task is pure: it reads rows and text, and uses no file and no model.
"""

from __future__ import annotations

import datetime
import decimal
import difflib
import json
import math
import re
import uuid
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from dsbs.config import TaskSection, unknown
from dsbs.config.registry import TASKS, entry
from dsbs.errors import UserError
from dsbs.records import Example, Unreadable

if TYPE_CHECKING:
    from dsbs.tasks.label_set import LabelSet

Fields = Mapping[str, Any]
# Between the inputs of a row's choices, in the text that a label head reads. No such input has it.
CHOICE_SEPARATOR = "\x1e"

# How pandas spells a missing cell where it was turned into text.
MISSING_WORDS = frozenset({"nan", "NaN", "NaT", "<NA>"})
_SCALARS = (
    int, float, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta, uuid.UUID
)  # fmt: skip
_AMBIGUOUS_IN_LIST = re.compile(r"[,;\n\r]|^\s|[\s.:]$")


class Task:
    """One kind of task. Subclasses set the class attributes and override what differs."""

    inputs: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Canonical input field -> other names that data sets give it."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Canonical input fields that may be missing."""
    id_columns: ClassVar[tuple[str, ...]] = ("id",)
    label_columns: ClassVar[tuple[str, ...]] = ("label",)
    rationale_columns: ClassVar[tuple[str, ...]] = ("rationale",)
    goal: ClassVar[str | None] = None
    """What to decide, in a sentence for a model; ``task.description`` comes first. None: nothing
    can be said of all tasks of this kind."""
    needs_fields: ClassVar[bool] = False
    """Whether reading a label needs its row's fields, so that plain text is not a valid input."""
    has_choices: ClassVar[bool] = False
    """Whether each row has choices of its own, one of which is its label."""
    has_prompt_file: ClassVar[bool] = True
    """Whether its default prompt is ``prompts/<name>.yaml``. Otherwise that is zero-shot."""
    no_label: ClassVar[tuple[str, ...]] = ("",)
    """Values of the label column in unlabeled rows."""

    def __init__(self, section: TaskSection) -> None:
        self.section = section
        self.name = section.name

    @property
    def label_set(self) -> LabelSet | None:
        """The closed set of labels; None where answers are free text or differ between rows."""
        return None

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The labels of the closed set, if there is one."""
        return None if self.label_set is None else self.label_set.labels

    @property
    def head_labels(self) -> tuple[str, ...]:
        """The outputs of a label head: one for each label of the closed set. Empty: no label head
        can learn the task, or it scores each row's choices.
        """
        return self.labels or ()

    @property
    def has_several_labels(self) -> bool:
        """Whether a row has any number of ``head_labels``, each with a probability of its own."""
        return False

    @property
    def is_free_text(self) -> bool:
        """Whether any text is an answer, so that two different texts may mean the same."""
        return False

    @property
    def is_equation(self) -> bool:
        """Whether an answer is an equation, whose value may be right although its text differs."""
        return False

    def fields(self, row: Fields, where: str) -> dict[str, Any]:
        """The canonical input fields of a raw row. Raises UserError naming a missing column."""
        fields = {}
        for field, aliases in self.inputs.items():
            mapped = self.section.columns.get(field)
            column = column_of(row, (field, *aliases) if mapped is None else (mapped,))
            if column is not None:
                fields[field] = row[column]
            elif field not in self.optional or mapped is not None:
                raise missing_column(where, field, row, mapped)
        return self.check_fields(fields, row, where)

    def check_fields(self, fields: dict[str, Any], row: Fields, where: str) -> dict[str, Any]:
        """Check and complete the input fields. Raises UserError for an empty one."""
        return {field: input_text(value, field, where) for field, value in fields.items()}

    def gold_cell(self, value: Any, name: str, where: str) -> Any:
        """The value of a label's cell for ``gold``; None: the row is unlabeled."""
        label = cell_text(value, name, where)
        if label is None or label.strip() in self.no_label:
            return None
        if label.strip() in MISSING_WORDS and label.strip() not in self.head_labels:
            return None
        return value if isinstance(value, int | float) else label

    def gold_columns(self, row: Fields, where: str) -> Any:
        """The label of a row without a label's cell, from several columns. None: unlabeled."""
        return None

    @property
    def mapped_gold(self) -> dict[str, str]:
        """The columns that ``task.columns`` names for the parts of a label, by part."""
        return {}

    def gold(self, value: Any, fields: Fields, where: str) -> str:
        """A row's own label in canonical form. Raises UserError for a value that is not a label of
        the task.
        """
        return str(value).strip()

    def value(self, label: str) -> Any:
        """A canonical label as JSON has it: a text, a number, a list or an object."""
        return label

    def number(self, label: str) -> float | None:
        """The number that a label is on a scale. None: the labels have no order."""
        return None

    @property
    def has_order(self) -> bool:
        """Whether the closed set's labels are points of a scale, the lowest first."""
        return bool(self.labels) and self.number((self.labels or ("",))[0]) is not None

    def classes(self, label: str) -> tuple[str, ...]:
        """The classes that a row with this label belongs to, as rows per class are counted."""
        return (label,)

    # --- labels that consist of parts

    @property
    def part_names(self) -> tuple[str, ...]:
        """The parts of a label, each right or wrong by itself: a row's possible labels, or fields.
        Empty: a label has no parts.
        """
        return ()

    def parts(self, label: str) -> dict[str, str | None]:
        """The values of a label's parts, in the order of ``part_names``. None: absent."""
        return {}

    def label_of_parts(self, parts: Mapping[str, str | None]) -> str:
        """The written form of a label with these parts."""
        raise NotImplementedError

    def part_key(self, name: str, value: str | None) -> Hashable:
        """Equal for values of a part that mean the same. None: absent."""
        return value

    def correct_parts(self, predicted: str, gold: str) -> dict[str, bool]:
        """Whether each part is right, or rightly absent."""
        ours, theirs = self.parts(predicted), self.parts(gold)
        return {
            name: self.part_key(name, ours[name]) == self.part_key(name, theirs[name])
            for name in self.part_names
        }

    def part_spans(self, text: str) -> dict[str, tuple[int, int]]:
        """By part, where its value is in a text that a student wrote: start and end.

        Empty: the parts have no places of their own.
        """
        return {}

    def part_figures(self, rows: Sequence[Example]) -> dict[str, dict[str, Any]]:
        """Figures of the gold values of each part, where parts are more than yes or no: ``filled``
        (share of the labeled rows), ``labels`` (rows for each of a closed set) and ``not_in_input``
        (ids of rows whose value must occur in the input and does not).
        """
        return {}

    # --- reading and writing

    def label_schema(self) -> dict[str, Any]:
        """The JSON schema of a label in a teacher's reply."""
        if self.labels is None:
            return {"type": "string"}
        return {"type": "string", "enum": list(self.labels)}

    def json_text(self, value: Any) -> str | None:
        """The label of a JSON reply as text for ``read_label``. None: it can be no label.

        Numbers keep their spelling: they come as text.
        """
        if isinstance(value, bool):
            return json.dumps(value)
        return value if isinstance(value, str) else None

    def answer_form(self) -> tuple[str, str]:
        """For a model: a sentence or two about the possible answers, and their placeholder."""
        if self.labels is not None:
            return label_listing(self.labels, "The label is exactly one of"), "<label>"
        choice = "Give the final answer only, as short as it can be"
        return choice + (", as a number." if self.section.numeric else "."), "<answer>"

    def json_placeholder(self) -> Any:
        """The label of a JSON reply in a prompt's instruction."""
        return "<the answer>"

    def label_end(self, text: str) -> int | None:
        """Where the label that ``text`` begins with ends, if labels may have several lines.

        None: a label has one line.
        """
        return None

    def begins_label(self, text: str) -> bool:
        """Whether ``text`` begins with a label, where any text may be one: not with other words."""
        return True

    def written_labels(self) -> tuple[str, ...]:
        """Labels that must be read back as they are written. Empty: labels are free text, or differ
        between rows.
        """
        return self.labels or ()

    def text(self, fields: Fields) -> str:
        """The student's input, without any task prefix."""
        raise NotImplementedError

    def choice_texts(self, fields: Fields) -> dict[str, str]:
        """By choice, the input from which a label head scores it; see ``CHOICE_SEPARATOR``.

        Empty where the labels are the task's.
        """
        return {}

    def template_variables(self, fields: Fields, label: str | None = None) -> dict[str, Any]:
        """The variables of a prompt's templates: an example's fields and, for an exemplar, its
        label.
        """
        variables = dict(fields)
        if label is not None:
            variables["label"] = label
        return variables

    def read_label(self, text: str, fields: Fields) -> str | Unreadable:
        """The label that ``text`` states, in canonical form, or why there is none. Never uses the
        gold label.

        ``text`` is what follows the answer anchor in a teacher's reply, or a student's whole
        output.
        """
        raise NotImplementedError

    def answer(
        self, text: str, fields: Fields, distribution: Mapping[str, float] | None
    ) -> str | Unreadable:
        """The label of a student's output: what ``text`` states, else what ``choose`` makes of
        ``distribution``, where a row has one label.

        ``distribution``: the probability of each label; None: unknown.
        """
        label = self.read_label(text, fields)
        if isinstance(label, Unreadable) and distribution and not self.has_several_labels:
            return self.choose(tuple(distribution), tuple(distribution.values()))
        return label

    def choose(
        self,
        labels: Sequence[str],
        shares: Sequence[float],
        thresholds: Mapping[str, float | None] | None = None,
    ) -> str:
        """The answer of a distribution over ``labels``: the likeliest, the first of equal ones.

        ``thresholds`` are those of a task whose rows have several labels. None: 0.5 each.
        """
        return labels[shares.index(max(shares))]

    def probability_of(self, label: str, distribution: Mapping[str, float]) -> float | None:
        """The probability of an answer in a distribution over the labels. None: it has none."""
        return distribution.get(label)

    def head_targets(self, label: str) -> tuple[int, ...]:
        """For each of ``head_labels``, whether a row with this canonical label has it: 1 or 0."""
        classes = self.classes(label)
        return tuple(int(name in classes) for name in self.head_labels)

    def expected_number(self, distribution: Mapping[str, float]) -> float | None:
        """The mean of the labels' numbers. None: the labels have no order."""
        numbers = [self.number(label) for label in distribution]
        if None in numbers or not numbers:
            return None
        pairs = zip(numbers, distribution.values(), strict=True)
        return math.fsum(number * share for number, share in pairs if number is not None)

    def correct(self, predicted: str, gold: str) -> bool:
        """Whether two canonical labels mean the same."""
        return predicted == gold

    @property
    def checks_input(self) -> bool:
        """Whether some part of a label must occur in the input; see ``not_in_input``."""
        return False

    def not_in_input(self, label: str, fields: Fields) -> list[str]:
        """The parts of a label that must occur in the input, and do not."""
        return []


def label_listing(labels: Sequence[str], beginning: str) -> str:
    """A sentence that lists labels; one per line where a list with commas is ambiguous."""
    if not any(_AMBIGUOUS_IN_LIST.search(label) for label in labels):
        return f"{beginning}: {', '.join(labels)}."
    lines = "\n".join(f"- {' '.join(label.split())}" for label in labels)
    return f"{beginning} these, each on a line of its own:\n{lines}"


def column_of(row: Fields, names: Sequence[str]) -> str | None:
    """The row's column with one of ``names``; exact matches before case-insensitive ones, earlier
    names first.
    """
    folded = {str(column).strip().casefold(): column for column in row}
    for name in names:
        if name in row:
            return name
        if name.casefold() in folded:
            return str(folded[name.casefold()])
    return None


def missing_column(
    where: str, field: str, row: Fields, mapped: str | None = None, advice: str = ""
) -> UserError:
    """The error for a row without a field's column, or without the one that ``task.columns`` names
    for it (``mapped``).
    """
    columns = [str(column) for column in row if column not in ("teacher", "meta")]
    listed = ", ".join(columns) or "none"
    name = field if mapped is None else mapped
    hint = f"rename the column, or map it: task.columns: {{{field}: <column>}}"
    if mapped is not None:
        hint = f"task.columns.{field} must name a column of the file{advice}"
    for near in difflib.get_close_matches(name, columns, n=1):
        hint = f"did you mean {near!r}? {hint}"
    return UserError(f"{where}: no column {name!r} (columns: {listed})", hint=hint)


def cell_text(value: Any, name: str, where: str) -> str | None:
    """A cell's value as text; None where it is missing (null, NaN).

    Raises UserError for a value that is not text: a list, an object, bytes that are not UTF-8.
    """
    if value is None or (isinstance(value, float | decimal.Decimal) and math.isnan(value)):
        return None
    hint = f"write {name} as text, or remove the row"
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise UserError(
                f"{where}: {name} has bytes that are not UTF-8 text ({value[:20]!r})",
                hint=f"{hint}; decode the column before writing the file",
            ) from None
    if isinstance(value, str):
        if "\0" in value:
            raise UserError(f"{where}: {name} has a NUL character", hint="remove the character")
        return value
    if isinstance(value, float) and math.isinf(value):
        raise UserError(f"{where}: {name} is an infinite number", hint=hint)
    if not isinstance(value, _SCALARS):
        kind = type(value).__name__
        raise UserError(f"{where}: {name} is a {kind}, not text ({value!r:.60})", hint=hint)
    return str(value)


def input_text(value: Any, name: str, where: str) -> str:
    """The text of a cell of the input. Raises UserError for an empty one as well."""
    text = cell_text(value, name, where)
    if text is not None and text.strip() in MISSING_WORDS:
        raise UserError(
            f"{where}: {name} is {text.strip()!r}, which is how pandas writes an empty cell",
            hint="fill it in or remove the row",
        )
    if text is None or not text.strip():
        raise UserError(f"{where}: {name} is empty", hint="fill it in or remove the row")
    return text


def make_task(section: TaskSection) -> Task:
    """The task that a recipe's ``task`` section names."""
    if section.name not in TASKS:
        raise UserError(unknown("task", section.name, TASKS), hint="set task.name to one of them")
    task: Task = entry(TASKS, section.name)(section)
    return task
