"""Generation for your own data: free-text answers, compared as text or, with ``numeric``, as
numbers.
"""

from __future__ import annotations

import re

from dsbs.records import Unread
from dsbs.tasks import Fields, OwnDataTask, fold, tidy

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
            predicted_number = number_in(predicted)
            gold_number = number_in(gold)
            if predicted_number is not None and gold_number is not None:
                return abs(predicted_number - gold_number) <= 1e-4
        return fold(tidy(predicted)) == fold(tidy(gold))


def number_in(text: str) -> float | None:
    """The only number in ``text`` ("$1,250 a year"); None where there is none, or more than one."""
    text = _CURRENCY.sub(r" \1", text.replace("−", "-"))
    numbers = {float(match.replace(",", "")) for match in _NUMBER.findall(text)}
    return numbers.pop() if len(numbers) == 1 else None
