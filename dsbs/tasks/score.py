"""Score: a number on a scale, such as 1 to 5 stars.

The points of the scale are a closed set of labels with an order. A label is a point's number in
plain decimal digits: 3, 3.5, -1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from dsbs.config import TaskSection
from dsbs.errors import UserError
from dsbs.records import Unreadable
from dsbs.tasks import Fields
from dsbs.tasks.label_set import LabelSet
from dsbs.tasks.marks import first_line, tidy
from dsbs.tasks.numbers import numbers_in, plain_number
from dsbs.tasks.own_data import OwnDataTask

# "4/5", "4 out of 5", "4 of 5": the scale's highest number after a point.
_OF_HIGHEST = re.compile(r"\s*(?:/|\b(?:out\s+)?of\b)\s*", re.IGNORECASE)

_COMPUTED = re.compile(r"[+-]?\d*\.\d{5,}(?:e[+-]?\d{1,3})?")
_ROUNDING = 1e-5  # of a step: what 32-bit numbers in a data file may be off


class Score(OwnDataTask):
    goal = "Rate the text."

    def __init__(self, section: TaskSection) -> None:
        super().__init__(section)
        assert section.range is not None  # checked by the recipe
        low, high = (Decimal(repr(bound)) for bound in section.range)
        step = Decimal(repr(section.step))
        points = [low + i * step for i in range(int((high - low) / step) + 1)]
        self._points = {point: plain_number(point) for point in points}
        self._label_set = LabelSet(self._points.values())
        self._highest = high

    @property
    def label_set(self) -> LabelSet:
        return self._label_set

    def number(self, label: str) -> float:
        return float(label)

    def value(self, label: str) -> Any:
        return _json_number(Decimal(label))

    def choose(
        self,
        labels: Sequence[str],
        shares: Sequence[float],
        thresholds: Mapping[str, float | None] | None = None,
    ) -> str:
        """The median: the lowest point with at least half of the probability up to it.

        It minimizes the expected absolute error, and is always a point of the scale.
        """
        ordered = sorted(zip(labels, shares, strict=True), key=lambda pair: float(pair[0]))
        half = math.fsum(shares) / 2
        below = 0.0
        for label, share in ordered:
            below += share
            if below >= half:
                return label
        return ordered[-1][0]

    def label_schema(self) -> dict[str, Any]:
        return {"type": "number", "enum": [_json_number(point) for point in self._points]}

    def answer_form(self) -> tuple[str, str]:
        low, *_, high = self._points.values()
        listing = f"The score is a number from {low} to {high}"
        if self.section.step != 1:
            listing += f" in steps of {plain_number(Decimal(repr(self.section.step)))}"
        return f"{listing}.", "<score>"

    def json_placeholder(self) -> str:
        return "<the score, as a number>"

    def gold(self, value: Any, fields: Fields, where: str) -> str:
        # all lines of a cell count, unlike those of a reply
        label = self.read_label(" ".join(str(value).splitlines()), fields)
        if isinstance(label, Unreadable):
            label = self._computed_point(value) or label
        if isinstance(label, str):
            return label
        low, *_, high = self._points.values()
        raise UserError(
            f"{where}: the score {str(value)[:60]!r} is not a number from {low} to {high} in steps "
            f"of {self.section.step:g}",
            hint="fix the row, or change task.range or task.step",
        )

    def _computed_point(self, value: Any) -> str | None:
        """The point that a binary fraction stands for, such as 0.30000000000000004 for 0.3."""
        if not _COMPUTED.fullmatch(str(value)):
            return None
        number = float(value)
        point = min(self._points, key=lambda point: abs(float(point) - number))
        is_same = abs(float(point) - number) <= _ROUNDING * self.section.step
        return self._points[point] if is_same else None

    def read_label(self, text: str, fields: Fields) -> str | Unreadable:
        """The point that the first line states. A number between two points is none of them."""
        line = first_line(text)
        if not tidy(line):
            return Unreadable("empty")
        stated: dict[Decimal, str | None] = {}
        last_end = 0
        for number, start, end in numbers_in(line):
            is_highest = stated and _OF_HIGHEST.fullmatch(line, last_end, start)
            last_end = end
            if is_highest and number == self._highest:
                continue
            if is_highest or line[end:].lstrip().startswith("%"):
                return Unreadable("label-outside-set", tidy(line))  # of another scale
            stated[number] = self._points.get(number)
        if len(stated) > 1:
            return Unreadable("several-answers", tidy(line))
        label = next(iter(stated.values()), None)
        return label if label is not None else Unreadable("label-outside-set", tidy(line))


def _json_number(number: Decimal) -> int | float:
    return int(number) if number == int(number) else float(number)
