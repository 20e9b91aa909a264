"""SVAMP (Patel et al., 2021): word problems whose label is an equation, compared by value as in the
paper.
"""

from __future__ import annotations

import re
from typing import Any

from dsbs.errors import UserError
from dsbs.records.rows import Unread
from dsbs.tasks import equation
from dsbs.tasks.base import Fields, Task, first_line, tidy

_WORDS_ONLY = re.compile(r"^[\s.,!*$]*(?:[A-Za-z][A-Za-z'’.,!\s-]*)?$")
_ARITHMETIC = re.compile(r"[\d\s.,()+*/-]*")
_SENTENCE_END = re.compile(r"\.(?=\s|$)")


class Svamp(Task):
    inputs = {"body": (), "question": ()}
    id_columns = ("id", "ID")
    label_columns = ("label", "Equation")

    @property
    def is_equation(self) -> bool:
        return True

    def gold(self, value: Any, fields: Fields, where: str) -> str:
        parsed = equation.parse(str(value))
        if parsed is None:
            raise UserError(
                f"{where}: label {str(value)[:60]!r} is not an equation",
                hint="write numbers, + - * / and parentheses",
            )
        return parsed.text

    def text(self, fields: Fields) -> str:
        return f"{fields['body']}\n{fields['question']}"

    def read_label(self, text: str, fields: Fields) -> str | Unread:
        """The complete expression in the answer's sentence: of "(16 * 17) * 4" not just "(16 *
        17)".
        """
        line = first_line(text)
        if not tidy(line):
            return Unread("empty")
        end = _SENTENCE_END.search(line)
        sentence = line[: end.start()] if end else line
        sentence = sentence.strip(" *`\"'").replace("$", "")
        left, equals, right = sentence.partition("=")
        parsed = _leading_expression(left)
        if isinstance(parsed, Unread):
            if not end and line.count("(") > line.count(")"):
                return Unread("truncated", sentence)
            return parsed
        if equals:
            result = _leading_expression(right)
            if isinstance(result, Unread) or not equation.same_value(parsed, result):
                return Unread("unparsed", sentence)
        return parsed

    def correct(self, predicted: str, gold: str) -> bool:
        return equation.same_value(predicted, gold)


def _leading_expression(text: str) -> str | Unread:
    """The expression at the start of a text, which words such as a unit may follow ("(10 * 45)
    seeds").
    """
    text = equation.plain(text)
    match = _ARITHMETIC.match(text)
    end = match.end() if match else 0
    tail = text[end:]
    parsed = equation.parse(text[:end])
    if parsed is not None and _WORDS_ONLY.match(tail):
        return parsed.text
    if parsed is None:
        numbers = re.findall(r"\d[^a-zA-Z]*", text)
        has_several = len(numbers) > 1 and re.search(r"\b(and|or)\b|,\s", text)
    else:
        has_several = re.match(r"\s*(and|or|,)\b", tail)
    return Unread("several-answers" if has_several else "unparsed", text.strip())
