"""SVAMP (Patel et al., 2021): word problems whose label is an equation, compared by value as in the
paper.

Equations have numbers, + − × ÷ and parentheses. They are parsed within size limits and never
evaluated as code.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dsbs.errors import UserError
from dsbs.records import Unreadable
from dsbs.tasks import Fields, Task
from dsbs.tasks.marks import first_line, tidy

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
        parsed = parse_equation(str(value))
        if parsed is None:
            raise UserError(
                f"{where}: label {str(value)[:60]!r} is not an equation",
                hint="write numbers, + - * / and parentheses",
            )
        return parsed.text

    def text(self, fields: Fields) -> str:
        return f"{fields['body']}\n{fields['question']}"

    def read_label(self, text: str, fields: Fields) -> str | Unreadable:
        """The complete expression in the answer's sentence: of "(16 * 17) * 4" not just "(16 *
        17)".
        """
        line = first_line(text)
        if not tidy(line):
            return Unreadable("empty")
        end = _SENTENCE_END.search(line)
        sentence = line[: end.start()] if end else line
        sentence = sentence.strip(" *`\"'").replace("$", "")
        left, equals, right = sentence.partition("=")
        parsed = _leading_expression(left)
        if isinstance(parsed, Unreadable):
            if not end and line.count("(") > line.count(")"):
                return Unreadable("truncated", sentence)
            return parsed
        if equals:
            result = _leading_expression(right)
            if isinstance(result, Unreadable) or not same_value(parsed, result):
                return Unreadable("unparsed", sentence)
        return parsed

    def correct(self, predicted: str, gold: str) -> bool:
        return same_value(predicted, gold)


def _leading_expression(text: str) -> str | Unreadable:
    """The expression at the start of a text, which words such as a unit may follow ("(10 * 45)
    seeds").
    """
    text = plain(text)
    match = _ARITHMETIC.match(text)
    end = match.end() if match else 0
    tail = text[end:]
    parsed = parse_equation(text[:end])
    if parsed is not None and _WORDS_ONLY.match(tail):
        return parsed.text
    if parsed is None:
        numbers = re.findall(r"\d[^a-zA-Z]*", text)
        has_several = len(numbers) > 1 and re.search(r"\b(and|or)\b|,\s", text)
    else:
        has_several = re.match(r"\s*(and|or|,)\b", tail)
    return Unreadable("several-answers" if has_several else "unparsed", text.strip())


# Limits count what the canonical text keeps, so that the canonical text can be parsed again.
MAX_OPERATORS = 20
MAX_DIGITS = 15  # before the point, and after it
MAX_CHARACTERS = 2000
MAX_DEPTH = 64

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|\.\d+)|(?P<operator>[-+*/()]))"
)
_SPELLINGS = str.maketrans(
    {"×": "*", "·": "*", "∗": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")"}
)
_TIMES_X = re.compile(r"(?<=[\d)])\s+[xX]\s+(?=[\d(])")

_OPERATORS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


def plain(text: str) -> str:
    """Replace ×, ÷, −, brackets, and an x between two numbers by + - * / ( )."""
    return _TIMES_X.sub(" * ", text.translate(_SPELLINGS))


@dataclass(frozen=True, slots=True)
class Equation:
    """An expression's exact value (None: division by zero) and its text in SVAMP's format."""

    value: Fraction | None
    text: str


def parse_equation(text: str) -> Equation | None:
    """Parse a text that is one expression; None for any other text."""
    text = plain(text).strip()
    if not text or len(text) > MAX_CHARACTERS:
        return None
    tokens: list[str] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            return None
        token = match["operator"] or match["number"].replace(",", "")
        if max(map(len, token.split("."))) > MAX_DIGITS:
            return None
        tokens.append(token)
        at = match.end()
    if sum(token in "+-*/" for token in tokens) > MAX_OPERATORS:
        return None
    try:
        equation, rest = _sum(tokens, 0, 0)
    except _NotArithmeticError:
        return None
    return equation if rest == len(tokens) else None


class _NotArithmeticError(Exception):
    pass


def _sum(tokens: list[str], at: int, depth: int) -> tuple[Equation, int]:
    left, at = _product(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "+-":
        right, after = _product(tokens, at + 1, depth)
        left = _apply(tokens[at], left, right)
        at = after
    return left, at


def _product(tokens: list[str], at: int, depth: int) -> tuple[Equation, int]:
    left, at = _atom(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "*/":
        right, after = _atom(tokens, at + 1, depth)
        left = _apply(tokens[at], left, right)
        at = after
    return left, at


def _atom(tokens: list[str], at: int, depth: int) -> tuple[Equation, int]:
    if at >= len(tokens) or depth > MAX_DEPTH:
        raise _NotArithmeticError
    token = tokens[at]
    if token == "(":
        inner, at = _sum(tokens, at + 1, depth + 1)
        if at >= len(tokens) or tokens[at] != ")":
            raise _NotArithmeticError
        return inner, at + 1
    if token == "-":
        inner, at = _atom(tokens, at + 1, depth + 1)
        value = None if inner.value is None else -inner.value
        return Equation(value, f"-{inner.text}"), at
    if token[0] in "0123456789.":
        return Equation(Fraction(token), _number(token)), at + 1
    raise _NotArithmeticError


def _apply(sign: str, left: Equation, right: Equation) -> Equation:
    text = f"( {left.text} {sign} {right.text} )"
    if left.value is None or right.value is None or (sign == "/" and right.value == 0):
        return Equation(None, text)
    return Equation(_OPERATORS[sign](left.value, right.value), text)


def _number(token: str) -> str:
    """A number in SVAMP's format, with at least one decimal: 84 as 84.0."""
    integer, _, decimals = token.partition(".")
    return f"{int(integer or '0')}.{decimals.rstrip('0') or '0'}"


def same_value(a: str, b: str, tolerance: float = 1e-4) -> bool:
    """Whether two expressions have the same finite value, within an absolute tolerance."""
    left = parse_equation(a)
    right = parse_equation(b)
    if left is None or right is None or left.value is None or right.value is None:
        return False
    return abs(left.value - right.value) <= Fraction(tolerance)
