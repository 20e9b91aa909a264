"""The recipe's section ``task``: what to learn, and the files with the rows."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any, Literal

from pydantic import Field, FiniteFloat, field_validator, model_validator

from dsbs.config.registry import TASKS
from dsbs.config.sections import Section, label_key, plain_text, unknown

LongInput = Literal["head", "tail", "head+tail", "windows"]
_OWN_DATA_TASKS = ("classification", "multilabel", "score", "extraction", "generation")
# The keys that describe the answers, and the tasks that they belong to.
_KEYS = {
    "labels": ("classification", "multilabel"),
    "range": ("score",),
    "step": ("score",),
    "fields": ("extraction",),
    "numeric": ("generation",),
    "input": _OWN_DATA_TASKS,
    "max_input": _OWN_DATA_TASKS,
}
_REQUIRED = {
    "classification": ("labels", "labels: [billing, shipping]"),
    "multilabel": ("labels", "labels: [billing, shipping]"),
    "score": ("range", "range: [1, 5]"),
    "extraction": ("fields", "fields: {sender: {type: text}, amount: {type: number}}"),
}
_MAX_POINTS = 201  # of a scale: its points are classes
RESERVED_COLUMNS = ("id", "label", "rationale", "teacher", "teachers", "meta", "input")
"""Columns that are never a row's input."""
_FIELD_NAME = re.compile(r"[^\W\d][\w -]{0,59}")


def _labels_as_text(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return value
    for number, label in enumerate(value, 1):
        if not isinstance(label, str | int) or isinstance(label, bool):
            raise ValueError(
                f'entry {number} is {label!r}, not text: quote it, as in labels: ["yes", "1.0"]'
            )
    return [str(label) for label in value]


def _distinct_labels(value: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    if len(value) < 2:
        raise ValueError("at least two labels are needed")
    labels: dict[str, str] = {}
    for label in value:
        key = " ".join(plain_text(label).lower().split())
        if not key:
            raise ValueError("a label must not be empty")
        if labels.setdefault(key, label) != label:
            raise ValueError(
                f"{labels[key]!r} and {label!r} cannot be told apart: labels must differ in "
                "more than case, spaces, and the Unicode form of their characters"
            )
    if len(labels) < len(value):
        repeated = next(label for label in value if value.count(label) > 1)
        raise ValueError(f"the label {repeated!r} is given twice")
    return value


class DataSection(Section):
    """The files with the rows.

    Each is a path (.jsonl, .csv, .tsv, each also with .gz; .parquet) or
    ``hub://<repository>[:<config>]/<split>``.
    """

    train: str
    """The rows that students learn from. Validation and test rows are split off where they are not
    given."""
    served: str | None = None
    """More train rows, which ``dsbs annotate --from-serve`` writes: those that a server asked the
    teacher. They are never validation or test rows, and ``limit`` does not count them. None: there
    are none."""
    valid: str | None = None
    """The validation rows. None: a part of train, chosen by a hash of the ids."""
    test: str | None = None
    """The test rows. None: a part of train, chosen by a hash of the ids."""
    valid_fraction: float = Field(0.1, gt=0, lt=0.5)
    """The share of the train rows used for validation if ``valid`` is None."""
    test_fraction: float = Field(0.2, gt=0, lt=0.9)
    """The share of the train file's rows used as test rows if ``test`` is None."""


class FieldSection(Section):
    """One named field of an extraction."""

    type: Literal["label", "text", "number", "date", "list"]
    """What a value is: a label of ``labels``, text, a number, a day, or a list of texts."""
    labels: tuple[str, ...] | None = None
    """label: the closed set of labels, two or more."""
    required: bool = False
    """Whether each row has a value. Other fields may be absent (null)."""
    verbatim: bool = False
    """text and list: whether the value must occur in the input, ignoring case and white space."""
    day_first: bool = False
    """date: whether 03/04/2025 is the third of April. False: the fourth of March."""

    _read_labels = field_validator("labels", mode="before")(_labels_as_text)
    _check_labels = field_validator("labels")(_distinct_labels)

    @model_validator(mode="after")
    def _keys_belong_to_the_type(self) -> FieldSection:
        if self.type == "label" and self.labels is None:
            raise ValueError("labels is needed for a field of type label")
        if self.type != "label" and self.labels is not None:
            raise ValueError(f"labels belongs to fields of type label, not {self.type}")
        if self.type not in ("text", "list") and self.verbatim:
            raise ValueError(f"verbatim belongs to fields of type text and list, not {self.type}")
        if self.type != "date" and self.day_first:
            raise ValueError(f"day_first belongs to fields of type date, not {self.type}")
        for label in self.labels or ():
            if label_key(label) == "null":
                raise ValueError(f"the label {label!r} means that there is no value: remove it")
            if label != " ".join(label.split()) or label.endswith((";", ",")):
                raise ValueError(
                    f"the label {label!r} must be on one line, with single spaces, and without a "
                    "comma or semicolon at its end"
                )
        return self


class MaxInputSection(Section):
    """How to cut texts that are longer than the student reads (``student.max_input_tokens``)."""

    strategy: LongInput = "head"
    """The part that is read. head: the beginning; tail: the end; head+tail: half of each; windows:
    up to ``windows`` consecutive parts, which a label head reads one by one and averages."""
    windows: int = Field(8, ge=2)
    """windows: the maximum number of parts. The rest of the text is not read."""

    @property
    def most_windows(self) -> int:
        """How many inputs a text may become."""
        return self.windows if self.strategy == "windows" else 1


class TaskSection(Section):
    """The task to learn, and its data."""

    name: str
    """A registered task; for your own data ``classification`` (one label), ``multilabel`` (any
    number of labels), ``score`` (a number on a scale), ``extraction`` (named fields) or
    ``generation`` (free text)."""
    data: DataSection
    """The files with the rows."""
    limit: int | None = Field(None, gt=0)
    """Maximum number of rows per split. None: all rows. Results of a limited run are not
    reportable."""
    labels: tuple[str, ...] | None = None
    """classification and multilabel: the closed set of labels, two or more, as they are spelled
    (007, no and 1.0 need no quotes). None: the task fixes them, or they are free text."""
    range: tuple[FiniteFloat, FiniteFloat] | None = None
    """score: the lowest and the highest number."""
    step: float = Field(1, gt=0, allow_inf_nan=False)
    """score: the distance between two points of the scale."""
    fields: dict[str, FieldSection] | None = None
    """extraction: the fields by name, in the order in which they are written."""
    input: str | None = None
    """Your own data: Jinja template of the student's input over the row's fields. None: the only
    text column."""
    columns: dict[str, str] = {}
    """Maps a name used here (id, label, rationale, an input field or a field to extract) to the
    file's column. multilabel: ``separator`` is the text between the labels in a cell."""
    description: str | None = None
    """One sentence for the default prompt: what to decide or answer. None: a general sentence."""
    numeric: bool = False
    """generation: compare answers as numbers (tolerance 1e-4) if both are numbers."""
    max_input: MaxInputSection = MaxInputSection()
    """Your own data: how to cut texts that are longer than the student reads."""

    @field_validator("name")
    @classmethod
    def _known_task(cls, value: str) -> str:
        if value not in TASKS:
            raise ValueError(unknown("task", value, TASKS))
        return value

    _read_labels = field_validator("labels", mode="before")(_labels_as_text)
    _check_labels = field_validator("labels")(_distinct_labels)

    @field_validator("fields")
    @classmethod
    def _fields_have_distinct_names(
        cls, value: dict[str, FieldSection] | None
    ) -> dict[str, FieldSection] | None:
        if value is not None and not value:
            raise ValueError("at least one field is needed")
        names: dict[str, str] = {}
        for name in value or ():
            if not _FIELD_NAME.fullmatch(name) or name != " ".join(name.split()):
                raise ValueError(
                    f"the field name {name!r}: use letters, digits, _, - and single spaces, "
                    "with a letter first"
                )
            if name.casefold() in (*RESERVED_COLUMNS, "text"):
                raise ValueError(
                    f"the field name {name!r} is that of a column with another meaning: rename it"
                )
            other = names.setdefault(re.sub(r"[\s_-]+", " ", label_key(name)), name)
            if other != name:
                raise ValueError(f"the fields {other!r} and {name!r} cannot be told apart")
        return value

    @model_validator(mode="after")
    def _keys_belong_to_the_task(self) -> TaskSection:
        if self.name in _REQUIRED:
            key, example = _REQUIRED[self.name]
            if getattr(self, key) is None:
                raise ValueError(f"task.{key} is needed for {self.name}, e.g. {example}")
        for key, tasks in _KEYS.items():
            if self.name in tasks or getattr(self, key) == type(self).model_fields[key].default:
                continue
            names = " and ".join((", ".join(tasks[:-1]), tasks[-1])) if tasks[1:] else tasks[0]
            raise ValueError(f"task.{key} belongs to {names}, not to {self.name}")
        if self.name == "multilabel":
            self._check_multilabel()
        if self.range is not None:
            self._check_scale(*self.range)
        return self

    def _check_multilabel(self) -> None:
        if self.columns.get("separator") == "":
            raise ValueError(
                "task.columns.separator is empty: give the text between the labels in a cell, e.g. "
                "separator: ','"
            )
        for label in self.labels or ():
            if ";" in label or "\n" in label:
                raise ValueError(
                    f"the label {label!r} has a semicolon or a line break, which separate the "
                    "labels of a row"
                )
            if label_key(label) in ("none", "[]"):
                raise ValueError(f"the label {label!r} means that a row has no label: remove it")

    def _check_scale(self, low: float, high: float) -> None:
        steps = (Decimal(repr(high)) - Decimal(repr(low))) / Decimal(repr(self.step))
        if high <= low or steps != int(steps):
            raise ValueError(
                f"task.range [{low:g}, {high:g}] in steps of {self.step:g}: the first number must "
                "be the smaller one, and a whole number of steps must lie between them"
            )
        if steps >= _MAX_POINTS:
            raise ValueError(
                f"task.range [{low:g}, {high:g}] in steps of {self.step:g} has {int(steps) + 1} "
                f"points: at most {_MAX_POINTS} are supported; use a larger step, or generation "
                "with numeric: true"
            )
