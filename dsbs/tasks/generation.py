"""Your own free-text answers, compared as text or, with ``numeric``, as numbers."""

from __future__ import annotations

import re

from dsbs.records.rows import Unread
from dsbs.tasks.base import Fields, fold, tidy
from dsbs.tasks.own import OwnDataTask

_CURRENCY = re.compile(r"(-?)\s*[$€£¥]\s*")
_NUMBER = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|-?\d+(?:\.\d+)?|-?\.\d+")


class Generation(OwnDataTask):
    @property
    def is_free_text(self) -> bool:
        return not self.section.numeric

    def read_label(self, text: str, fields: Fields) -> str | Unread:
        answer = tidy(text)
        return answer or Unread("empty")

    def correct(self, predicted: str, gold: str) -> bool:
        if self.section.numeric:
            a, b = number_in(predicted), number_in(gold)
            if a is not None and b is not None:
                return abs(a - b) <= 1e-4
        return fold(tidy(predicted)) == fold(tidy(gold))


def number_in(text: str) -> float | None:
    """The one number in ``text`` ("$1,250 a year"), or None where there is none or more than one."""
    text = _CURRENCY.sub(r" \1", text.replace("−", "-"))
    found = {float(match.replace(",", "")) for match in _NUMBER.findall(text)}
    return found.pop() if len(found) == 1 else None
