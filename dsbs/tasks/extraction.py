"""Extraction: the values of named fields.

A label is written as lines "field: value" in the recipe's order, with "null" for an absent value.
It is read from such lines, in any order, or from text whose line breaks became spaces, as some
tokenizers have it. A value therefore never contains a field's name with a colon.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from dsbs.config import TaskSection
from dsbs.errors import UserError
from dsbs.records import Example, Unreadable
from dsbs.tasks import MISSING_WORDS, Fields, column_of
from dsbs.tasks.field_values import ABSENT, ITEM_MARK, FieldType, field_type
from dsbs.tasks.marks import fold, tidy
from dsbs.tasks.own_data import OwnDataTask

_ITEM = re.compile(r"\s*(?:[-–—•*]|\d+[.)])\s+(?=\S)")  # below a list's name
_SEPARATING_MARKS = re.compile(r"(?:\s[-*•>]|\s?[;,])*$")  # at a value's end
_EMPTY_LINE = re.compile(r"\n[^\S\n]*\n")


class Extraction(OwnDataTask):
    goal = "Find the values of the fields in the text."

    def __init__(self, section: TaskSection) -> None:
        super().__init__(section)
        assert section.fields is not None  # checked by the recipe
        self.field_types: dict[str, FieldType] = {
            name: field_type(field) for name, field in section.fields.items()
        }
        names = sorted(self.field_types, key=len, reverse=True)
        any_name = "|".join(_name_pattern(name) for name in names)
        self._name_of = {_name_key(name): name for name in names}
        self._beginning = re.compile(
            rf"(?:^|(?<=[\s;,*_`>•-]))(?P<marks>[*_`]*)(?P<name>{any_name})[*_`]*\s*[:：][*_`]*(?=\s|$|\S)",
            re.IGNORECASE,
        )

    @property
    def is_free_text(self) -> bool:
        return True

    @property
    def part_names(self) -> tuple[str, ...]:
        return tuple(self.field_types)

    # --- the label's forms

    def value(self, label: str) -> dict[str, Any]:
        """The values by field; None: absent."""
        return {
            name: None if text is None else self.field_types[name].value(text)
            for name, text in self.parts(label).items()
        }

    def parts(self, label: str) -> dict[str, str | None]:
        texts = {}
        for line in label.split("\n"):
            name, _, text = line.partition(": ")
            texts[name] = None if text == ABSENT else text
        return {name: texts.get(name) for name in self.field_types}

    def part_key(self, name: str, value: str | None) -> Hashable:
        return self.field_types[name].key(value)

    def label_of_parts(self, parts: Mapping[str, str | None]) -> str:
        lines = []
        for name in self.field_types:
            value = parts.get(name)
            lines.append(f"{name}: {ABSENT if value is None else value}")
        return "\n".join(lines)

    def label_schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {name: kind.schema() for name, kind in self.field_types.items()},
            "required": list(self.field_types),
            "additionalProperties": False,
        }

    def json_text(self, value: Any) -> str | None:
        if isinstance(value, dict):
            try:
                return json.dumps(value, ensure_ascii=False)
            except TypeError:  # a name that is given twice with different values
                return None
        return super().json_text(value)

    def answer_form(self) -> tuple[str, str]:
        listing = "\n".join(
            f"- {name}: {kind.instruction}" for name, kind in self.field_types.items()
        )
        lines = "\n".join(f"{name}: <value or null>" for name in self.field_types)
        return (
            f"The fields are:\n{listing}\nWrite null for a field that the text does not state.",
            f"\n{lines}",
        )

    def json_placeholder(self) -> dict[str, str]:
        return dict.fromkeys(self.field_types, f"<value or {ABSENT}>")

    def part_spans(self, text: str) -> dict[str, tuple[int, int]]:
        spans: dict[str, tuple[int, int]] = {}
        for name, match, end in self._found(text):
            value = text[match.end() : end]
            length = len(value[: _value_length(value)].rstrip())
            spans.setdefault(name, (match.end(), match.end() + length))
        return spans

    def part_figures(self, rows: Sequence[Example]) -> dict[str, dict[str, Any]]:
        labeled = [(row, self.parts(row.label)) for row in rows if row.label is not None]
        missing = {
            row.id: set(self.not_in_input(row.label, row.input))
            for row in rows
            if row.label is not None
        }
        figures: dict[str, dict[str, Any]] = {}
        for name, kind in self.field_types.items():
            values = [parts[name] for _, parts in labeled if parts[name] is not None]
            figures[name] = {"filled": len(values) / max(1, len(labeled))}
            if kind.section.labels is not None:
                counts = Counter(values)
                figures[name]["labels"] = {label: counts[label] for label in kind.section.labels}
            if kind.section.verbatim:
                ids = [row_id for row_id, names in missing.items() if name in names]
                figures[name]["not_in_input"] = ids
        return figures

    # --- gold values

    def gold_cell(self, value: Any, name: str, where: str) -> Any:
        if isinstance(value, Mapping):
            return value
        text = super().gold_cell(value, name, where)
        if text is None:
            return None
        try:
            value = json.loads(str(text), object_pairs_hook=_distinct_pairs)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UserError(
                f"{where}: {name} is {str(text)[:60]!r}, not an object with a value for each field",
                hint='e.g. {"sender": "Ann", "amount": null}, or a column for each field',
            )
        return value

    def gold_columns(self, row: Fields, where: str) -> dict[str, Any] | None:
        values: dict[str, Any] = {}
        for name in self.field_types:
            column = column_of(row, (self.section.columns.get(name, name),))
            if column is not None and column not in self._input_columns:
                values[name] = row[column]
        if all(_is_missing(value) for value in values.values()):
            return None
        return values

    @property
    def mapped_gold(self) -> dict[str, str]:
        return {
            name: column
            for name, column in self.section.columns.items()
            if name in self.field_types and column not in self._input_columns
        }

    @property
    def _input_columns(self) -> set[str]:
        """The columns that ``task.input`` reads: what the student reads is no gold value."""
        columns = self.section.columns
        return {columns.get(name, name) for name in self._template_fields or ()}

    def gold(self, value: Any, fields: Fields, where: str) -> str:
        unknown = [str(name) for name in value if _name_key(str(name)) not in self._name_of]
        if unknown:
            raise UserError(
                f"{where}: the label has a field {unknown[0]!r} that task.fields does not have",
                hint=f"the fields are: {', '.join(self.field_types)}",
            )
        values: dict[str, str | None] = {}
        for key, cell in value.items():
            name = self._name_of[_name_key(str(key))]
            if name in values:
                raise UserError(
                    f"{where}: the label has the field {name!r} twice",
                    hint="a field's name is the same in any case, with - and _ for a space",
                )
            read = None if _is_missing(cell) else self._canonical(name, cell)
            if isinstance(read, Unreadable):
                raise UserError(
                    f"{where}: {name} is {str(cell)[:60]!r}, {read.detail}",
                    hint="fix the row, or change the field's type in task.fields",
                )
            values[name] = read
        for name, kind in self.field_types.items():
            if kind.section.required and values.get(name) is None:
                raise UserError(
                    f"{where}: {name} has no value, and task.fields requires one",
                    hint="fill it in, remove the row, or remove required: true",
                )
        return self.label_of_parts(values)

    def _canonical(self, name: str, value: Any) -> str | Unreadable | None:
        """A value in its field's canonical form, which ``_texts`` can read. None: absent."""
        text = self.field_types[name].canonical(value)
        if isinstance(text, Unreadable) or not text:
            return text or None
        if self._beginning.search(text):
            return Unreadable("unparsed", "which has a field's name and a colon in it")
        # a mark at the end separates fields where line breaks became spaces
        value_text = _value_text(text, is_last=False)
        if not value_text or self.field_types[name].canonical(value_text) != value_text:
            return Unreadable("unparsed", "which ends in a mark that separates fields")
        return value_text

    # --- replies and outputs

    def read_label(self, text: str, fields: Fields) -> str | Unreadable:
        if not tidy(text):
            return Unreadable("empty")
        value_of = _json_object(text)
        if value_of is None:
            texts = self._texts(text)
            if isinstance(texts, Unreadable):
                return texts
            missing = [name for name in self.field_types if name not in texts]
            if missing:
                return Unreadable("unparsed", f"no {missing[0]}")
            value_of = dict(texts)
        values: dict[str, str | None] = {}
        for key, value in value_of.items():
            name = self._name_of.get(_name_key(str(key)))
            if name is None:
                return Unreadable("unparsed", f"unknown field {str(key)[:60]}")
            read = self._read_value(name, value)
            if isinstance(read, Unreadable):
                return Unreadable(read.reason, f"{name}: {read.detail}")
            if values.setdefault(name, read) != read:
                return Unreadable("several-answers", f"{name} is given twice")
        for name, kind in self.field_types.items():
            if kind.section.required and values.get(name) is None:
                return Unreadable("unparsed", f"no {name}")
        return self.label_of_parts(values)

    def _read_value(self, name: str, value: Any) -> str | Unreadable | None:
        if value is None or (isinstance(value, str) and _says_absent(value)):
            return None
        return self._canonical(name, value)

    @property
    def checks_input(self) -> bool:
        return any(kind.section.verbatim for kind in self.field_types.values())

    def not_in_input(self, label: str, fields: Fields) -> list[str]:
        """The ``verbatim`` fields with a value that does not occur in the input."""
        text = fold(self.text(fields))
        return [
            name
            for name, value in self.parts(label).items()
            if value is not None
            and self.field_types[name].section.verbatim
            and not all(fold(item) in text for item in self.field_types[name].items(value))
        ]

    def label_end(self, text: str) -> int:
        """The end of the lines of the last field, or of the JSON object.

        What follows all fields is not the label, even where it names one of them again.
        """
        span = _json_span(text)
        if span is not None:
            return span[1]
        names = set()
        end = 0
        for match in self._beginning.finditer(text):
            end = match.end() + _value_length(text[match.end() :])
            names.add(self._name_of[_name_key(match["name"])])
            if len(names) == len(self.field_types):
                break
        return end or len(text.partition("\n")[0])

    def begins_label(self, text: str) -> bool:
        match = self._beginning.search(text)
        is_first = match is not None and not any(map(str.isalnum, text[: match.start()]))
        return is_first or _json_span(text) is not None

    def _found(self, text: str) -> Iterator[tuple[str, re.Match[str], int]]:
        """Each field that the text names, where, and the end of what follows its name."""
        matches = list(self._beginning.finditer(text))
        for match, following in itertools.zip_longest(matches, matches[1:]):
            end = len(text) if following is None else following.start()
            yield self._name_of[_name_key(match["name"])], match, end

    def _texts(self, text: str) -> dict[str, str] | Unreadable:
        """The text after each field's name."""
        texts: dict[str, str] = {}
        for name, match, end in self._found(text):
            is_last = end == len(text)
            lines = text[match.end() : end]
            length = _value_length(lines)
            rest = _EMPTY_LINE.split(lines[length:])[0] if is_last else lines[length:]
            if any(map(str.isalnum, rest)):
                return Unreadable("unparsed", f"{name} has lines without a field's name")
            value = _value_text(lines[:length], is_last=is_last)
            marks = match["marks"]
            if marks and not match.group().endswith(marks):  # "**sender: Ann**"
                value = value.removesuffix(marks).rstrip()
            if "\n" in value and self.field_types[name].section.type != "list":
                return Unreadable("several-answers", f"{name} has several values")
            value = value.replace("\n", f" {ITEM_MARK} ")
            if texts.setdefault(name, value) != value:
                return Unreadable("several-answers", f"{name} is given twice")
        return texts

    # --- equality

    def correct(self, predicted: str, gold: str) -> bool:
        """Whether all fields are equal; see ``FieldType.key``."""
        return all(self.correct_parts(predicted, gold).values())

    def _unassigned_columns(self, row: Fields) -> list[str]:
        names = {self.section.columns.get(name, name).casefold() for name in self.field_types}
        return [name for name in super()._unassigned_columns(row) if name.casefold() not in names]


def _name_key(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _name_pattern(name: str) -> str:
    return r"[\s_-]+".join(re.escape(part) for part in re.split(r"[\s_-]+", name))


def _is_missing(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip() in {"", *MISSING_WORDS})


def _says_absent(text: str) -> bool:
    return not text.strip() or tidy(text).casefold() == ABSENT


def _value_length(text: str) -> int:
    """The length of a value after its field's name: the rest of the line or, where that is empty,
    the lines below it with a bullet each.
    """
    first, *lines = text.split("\n")
    length = len(first)
    if not first.strip():
        for line in lines:
            if not _ITEM.match(line):
                break
            length += 1 + len(line)
    return length


def _value_text(text: str, *, is_last: bool) -> str:
    """A value on one line, or its items on a line each, without bullets and without the mark before
    the next field.
    """
    if text.strip() and not text.partition("\n")[0].strip():
        items = (_ITEM.sub("", line, count=1) for line in text.strip("\n").split("\n"))
        return "\n".join(" ".join(item.split()) for item in items if item.strip())
    text = " ".join(text.split())
    return text if is_last else _SEPARATING_MARKS.sub("", text)


def _distinct_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name is given twice")
    return values


_DECODER = json.JSONDecoder(
    parse_int=str, parse_float=str, object_pairs_hook=_distinct_pairs, strict=False
)


def _json_span(text: str) -> tuple[int, int] | None:
    """Where a JSON object is that the text begins with, apart from a code block's marks."""
    start = text.find("{")
    if start < 0 or text[:start].strip("` \t\r\njson"):
        return None
    try:
        return start, _DECODER.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


def _json_object(text: str) -> dict[str, Any] | None:
    span = _json_span(text)
    if span is None or any(map(str.isalnum, _EMPTY_LINE.split(text[span[1] :])[0])):
        return None
    value: dict[str, Any] = _DECODER.decode(text[slice(*span)])
    return value
