"""Arithmetic read by a whitelist: numbers, + − × ÷ and parentheses, within size limits. Nothing is ever evaluated as code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

# Limits count what the canonical spelling keeps, so that a readable expression's own spelling is readable too.
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


def plain(text: str) -> str:
    """The operators' other spellings as + - * / ( ): ×, ÷, −, brackets, and an x between two numbers."""
    return _TIMES_X.sub(" * ", text.translate(_SPELLINGS))


@dataclass(frozen=True, slots=True)
class Equation:
    """A parsed expression: its exact value (None: division by zero) and its text in SVAMP's own spelling."""

    value: Fraction | None
    text: str


def parse(text: str) -> Equation | None:
    """Read one whole expression, or None where ``text`` is anything else."""
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
        left, at = _apply(tokens[at], left, right), after
    return left, at


def _product(tokens: list[str], at: int, depth: int) -> tuple[Equation, int]:
    left, at = _atom(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "*/":
        right, after = _atom(tokens, at + 1, depth)
        left, at = _apply(tokens[at], left, right), after
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
        return Equation(None if inner.value is None else -inner.value, f"-{inner.text}"), at
    if token[0] in "0123456789.":
        value = Fraction(token)
        return Equation(value, _number(token)), at + 1
    raise _NotArithmeticError


def _apply(operator: str, left: Equation, right: Equation) -> Equation:
    text = f"( {left.text} {operator} {right.text} )"
    a, b = left.value, right.value
    if a is None or b is None or (operator == "/" and b == 0):
        return Equation(None, text)
    value = {"+": a.__add__, "-": a.__sub__, "*": a.__mul__, "/": a.__truediv__}[operator](b)
    return Equation(value, text)


def _number(token: str) -> str:
    """A number as SVAMP writes it: at least one decimal (84 as 84.0)."""
    whole, _, decimals = token.partition(".")
    return f"{int(whole or '0')}.{decimals.rstrip('0') or '0'}"


def same_value(a: str, b: str, tolerance: float = 1e-4) -> bool:
    """Whether two expressions have the same finite value, within an absolute tolerance."""
    left, right = parse(a), parse(b)
    if left is None or right is None or left.value is None or right.value is None:
        return False
    return abs(left.value - right.value) <= Fraction(tolerance)
