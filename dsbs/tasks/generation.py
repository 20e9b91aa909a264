"""Generation for your own data: free-text answers, compared as text or, with ``numeric``, as
numbers.
"""

from __future__ import annotations

import re

from dsbs.records import Unreadable
from dsbs.tasks import Fields
from dsbs.tasks.marks import fold, tidy, unwrapped
from dsbs.tasks.own_data import OwnDataTask

_CURRENCY = re.compile(r"(-?)\s*[$€£¥]\s*")
_NUMBER = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|-?\d+(?:\.\d+)?|-?\.\d+")


class Generation(OwnDataTask):
    @property
    def is_free_text(self) -> bool:
        return not self.section.numeric

    def read_label(self, text: str, fields: Fields) -> str | Unreadable:
        if not tidy(text):
            return Unreadable("empty")
        return _tidy_answer(text)

    def correct(self, predicted: str, gold: str) -> bool:
        if self.section.numeric:
            predicted_number = number_in(predicted)
            gold_number = number_in(gold)
            if predicted_number is not None and gold_number is not None:
                return abs(predicted_number - gold_number) <= 1e-4
        return fold(_tidy_answer(predicted)) == fold(_tidy_answer(gold))


def _tidy_answer(text: str) -> str:
    """A free answer without its wrapping, and with the marks that may be its own ("A*")."""
    return [text, *unwrapped(text, free=True)][-1]


def number_in(text: str) -> float | None:
    """The only number in ``text`` ("$1,250 a year"); None where there is none, or more than one."""
    text = _CURRENCY.sub(r" \1", text.replace("−", "-"))
    numbers = {float(match.replace(",", "")) for match in _NUMBER.findall(text)}
    return numbers.pop() if len(numbers) == 1 else None
