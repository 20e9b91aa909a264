"""Numbers in text: in any script's digits, with marks between thousands and before decimals."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from decimal import Decimal

# Marks as ASCII ones; a space that does not break a line separates thousands.
_MARKS = str.maketrans("−–‒－＋．，’٫٬\u00a0\u202f", "---" + "-+.,'.,''")
_WITHOUT_MARKS = str.maketrans("", "", ",.'")
_NUMBER = re.compile(
    r"""
    (?<![\w.,])  # not inside a word or another number
    [+-]?
    (?: \d{1,3} (?: (?P<mark>[,.']) \d{3} (?: (?P=mark) \d{3} )* ) (?: (?!(?P=mark)) [.,] \d+ )?
      | \d+ (?: [.,] \d+ )?
      | [.] \d+
    )
    (?: e [+-]? \d{1,3} )?
    (?! \w | [.,] \d)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_MAX_DIGITS = 40  # in full, with its marks


def numbers_in(text: str) -> Iterator[tuple[Decimal, int, int]]:
    """Each number in a text, with where it begins and ends.

    One mark before exactly three digits separates thousands (1,234), unless it is a point: 1.234 is
    between 1 and 2. Of two different marks the last one begins the decimals (1.234,5). A hyphen
    right after a word or a number is no minus: "3-4" has two numbers.
    """
    plain = "".join(map(_plain_digit, text.translate(_MARKS)))
    position = 0
    while match := _NUMBER.search(plain, position):
        start, end = match.span()
        if (
            plain[start] in "+-"
            and start
            and (plain[start - 1].isalnum() or plain[start - 1] in ")]")
        ):
            start += 1
        position = end
        number = _number(plain[start:end])
        if number is not None:
            yield number, start, end


def plain_number(number: Decimal) -> str:
    """A number in decimal digits, without an exponent and zeros at its end: 1200, 0.5."""
    text = format(number, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def _plain_digit(character: str) -> str:
    return str(unicodedata.decimal(character, character))


def _number(text: str) -> Decimal | None:
    """The value of a number's text; None: it has more digits than data have."""
    mantissa, _, exponent = text.lower().partition("e")
    marks = [character for character in mantissa if character in ",.'"]
    if marks:
        last = marks[-1]
        decimals = mantissa.rpartition(last)[2]
        is_decimal = last in ",." and marks.count(last) == 1
        if is_decimal and last == "," and len(decimals) == 3 and len(marks) == 1:
            is_decimal = mantissa.startswith(("0,", "-0,", "+0,"))
        integer, _, decimals = mantissa.rpartition(last) if is_decimal else (mantissa, "", "")
        mantissa = f"{integer.translate(_WITHOUT_MARKS)}.{decimals or 0}"
    number = Decimal(mantissa).scaleb(int(exponent or 0)).normalize()
    is_usual = abs(number.adjusted()) < _MAX_DIGITS and len(plain_number(number)) <= _MAX_DIGITS
    return number if is_usual else None
