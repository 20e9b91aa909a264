"""Field values: the types of a field to extract, and how their values are written and compared.

A canonical value is text on one line. Reading it again gives the same value.
"""

from __future__ import annotations

import datetime
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any

from dsbs.config import FieldSection
from dsbs.records import Unreadable
from dsbs.tasks import label_listing
from dsbs.tasks.label_set import LabelSet
from dsbs.tasks.marks import fold
from dsbs.tasks.numbers import numbers_in, plain_number

ABSENT = "null"
ITEM_MARK = "|"  # between the items of a list
_PAIRS = {'"': '"', "'": "'", "*": "*", "`": "`", "“": "”", "‘": "’"}
_AFTER_QUOTE = ".,;:!"
_SIGNED_CURRENCY = re.compile(r"(?<!\w)([-−–])\s*([$€£¥₹])")
_NUMBER_WORD = re.compile(
    r"\d\W*(?:(?:hundred|thousand|lakh|million|mio|mln|mn|crore|billion|bn|trillion|dozen)s?"
    r"|mill|mia|mrd|tsd|(?-i:[KMB]))\b",
    re.IGNORECASE,
)
_YEAR = re.compile(r"(?<![\d:.+])(?:1[5-9]|2[01])\d\d(?!\d)")
_DEFAULTS = (datetime.datetime(2001, 1, 1), datetime.datetime(2004, 2, 2))


class FieldType(ABC):
    """A type of values. Texts are compared without differences in case and white space."""

    instruction: str
    """What a value is, for a model."""

    def __init__(self, section: FieldSection) -> None:
        self.section = section

    @abstractmethod
    def canonical(self, value: Any) -> str | Unreadable:
        """A value of data or of a reply in canonical form; ``detail`` says what is wrong with it.

        Empty: no value.
        """

    def value(self, canonical: str) -> Any:
        """A canonical value as JSON has it."""
        return canonical

    def schema(self) -> dict[str, Any]:
        """The JSON schema of a value."""
        return {"type": ["string", "null"]}

    def key(self, canonical: str | None) -> Hashable:
        """Equal for values that mean the same. None: absent."""
        return None if canonical is None else fold(canonical)

    def items(self, canonical: str) -> list[str]:
        """The texts that a value consists of."""
        return [canonical]


class TextField(FieldType):
    instruction = "text"

    def __init__(self, section: FieldSection) -> None:
        super().__init__(section)
        if section.verbatim:
            self.instruction = "text, as it occurs there"

    def canonical(self, value: Any) -> str | Unreadable:
        if isinstance(value, list | dict | bool):
            return Unreadable("unparsed", "which is not text")
        text = _tidy(str(value))
        if text.casefold() == ABSENT:
            return Unreadable("unparsed", "which means that there is no value")
        return text


class ListField(FieldType):
    instruction = f"a list of texts, separated by {ITEM_MARK}"

    def canonical(self, value: Any) -> str | Unreadable:
        if isinstance(value, dict | bool):
            return Unreadable("unparsed", "which is not a list")
        items = value if isinstance(value, list) else _listed(str(value))
        texts = []
        for item in items:
            if isinstance(item, list | dict | bool) or item is None or ITEM_MARK in str(item):
                return Unreadable("unparsed", f"with an item that is not text or has a {ITEM_MARK}")
            text = _tidy(str(item))
            if text.casefold() == ABSENT:
                return Unreadable("unparsed", f"with an item {ABSENT}")
            if text:
                texts.append(text)
        return f" {ITEM_MARK} ".join(dict.fromkeys(texts))

    def value(self, canonical: str) -> list[str]:
        return self.items(canonical)

    def schema(self) -> dict[str, Any]:
        return {"type": ["array", "null"], "items": {"type": "string"}}

    def key(self, canonical: str | None) -> Hashable:
        """The order of the items does not matter."""
        return None if canonical is None else frozenset(map(fold, self.items(canonical)))

    def items(self, canonical: str) -> list[str]:
        return [item.strip() for item in canonical.split(ITEM_MARK)]


class NumberField(FieldType):
    instruction = "a number"

    def canonical(self, value: Any) -> str | Unreadable:
        if isinstance(value, list | dict | bool):
            return Unreadable("unparsed", "which is not a number")
        text = _SIGNED_CURRENCY.sub(r"\2\1", str(value))  # -$5
        if _NUMBER_WORD.search(text):
            return Unreadable("unparsed", "which has a number word: all digits are needed")
        numbers = {number for number, _, _ in numbers_in(text)}
        if len(numbers) != 1:
            many = "more than one number" if numbers else "not a number"
            return Unreadable("several-answers" if numbers else "unparsed", f"which is {many}")
        return plain_number(numbers.pop())

    def value(self, canonical: str) -> int | float:
        number = float(canonical)
        return int(canonical) if number.is_integer() and "." not in canonical else number

    def schema(self) -> dict[str, Any]:
        return {"type": ["number", "null"]}


class DateField(FieldType):
    instruction = "a day, as YYYY-MM-DD"

    def canonical(self, value: Any) -> str | Unreadable:
        from dateutil import parser

        if isinstance(value, datetime.date):
            return _iso_day(value)
        text = _tidy(unicodedata.normalize("NFKC", str(value)))
        if not text:
            return ""
        days = set()
        # A part that the text lacks is the default's, and differs between two defaults.
        for default in _DEFAULTS:
            try:
                day = parser.parse(text, default=default, dayfirst=self._day_first(text))
            except (ValueError, OverflowError, TypeError):
                return Unreadable("unparsed", "which is not a day")
            days.add(_iso_day(day))
        if len(days) > 1:
            return Unreadable("unparsed", "which lacks the year, the month or the day")
        day_text = days.pop()
        # dateutil reads "2-3 May 2025" as 3 May 2002 at 20:25
        if any(year != day_text[:4] for year in _YEAR.findall(text)):
            return Unreadable("unparsed", "which is not a day")
        return day_text

    def _day_first(self, text: str) -> bool:
        return self.section.day_first and not text[:4].isdecimal()


class LabelField(FieldType):
    def __init__(self, section: FieldSection) -> None:
        super().__init__(section)
        self._label_set = LabelSet(section.labels or ())
        self.instruction = label_listing(self._label_set.labels, "exactly one of").rstrip(".")

    def canonical(self, value: Any) -> str | Unreadable:
        if isinstance(value, list | dict):
            return Unreadable("unparsed", "which is not a label")
        label = self._label_set.of_value(value)
        if label is None and isinstance(value, str):
            label = self._label_set.lookup(value)
        if label is None:
            return Unreadable("label-outside-set", "which is not one of the field's labels")
        return label

    def schema(self) -> dict[str, Any]:
        return {"type": ["string", "null"], "enum": [*self._label_set.labels, None]}

    def key(self, canonical: str | None) -> str | None:
        return canonical


_TYPES: dict[str, type[FieldType]] = {
    "label": LabelField,
    "text": TextField,
    "number": NumberField,
    "date": DateField,
    "list": ListField,
}


def field_type(section: FieldSection) -> FieldType:
    """The type of a field of the recipe."""
    return _TYPES[section.type](section)


def _listed(text: str) -> list[Any]:
    """The items of a text: those of a JSON list, else what is between its marks."""
    if text.lstrip().startswith("["):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, list):
            return value
    return text.split(ITEM_MARK)


def _tidy(text: str) -> str:
    """Text on one line, without quotes or emphasis around all of it."""
    text = " ".join(text.split())
    while text:
        first, last = text[0], _PAIRS.get(text[0])
        if last is None:
            break
        quoted = text.rstrip(_AFTER_QUOTE)  # '"Ann".'
        layers = len(quoted) - len(quoted.lstrip(first))
        inner = quoted[layers:-layers].strip()
        if not inner or quoted[-layers:] != last * layers or first in inner or last in inner:
            break
        text = inner
    return text


def _iso_day(day: datetime.date) -> str:
    return f"{day.year:04}-{day.month:02}-{day.day:02}"
