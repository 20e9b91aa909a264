"""Marks around an answer: quotes, brackets, Markdown and final stops that models add."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_WRAPPING = " \t\r\n*_`\"'“”‘’"
EMPHASIS = "*_`\"'"
BRACKETS = {
    "(": ")", "[": "]", "{": "}", "<": ">", "“": "”", "‘": "’", "„": "“”", "«": "»", "「": "」",
    "『": "』", "【": "】", "（": "）",
}  # fmt: skip
_FINAL = ".!;,:。！；，：、"
# "- A", and "** A" of "**Answer:** A"
_BULLET = re.compile(r"[-–—•>#:=]+\s+(?=\D)|[*_]+\s+")
_LATEX = re.compile(r"\$*\\(?:boxed|text|textbf|mathrm)\{(.*)\}\$*")


def tidy(text: str) -> str:
    """An answer without the wrapping that models add: spaces, quotes, Markdown emphasis, a final
    full stop.
    """
    text = text.strip(_WRAPPING)
    return text.rstrip(".!;,:").strip(_WRAPPING)


def first_line(text: str) -> str:
    """The first line with more than spaces and Markdown marks."""
    return next((line for line in text.split("\n") if line.strip(_WRAPPING)), "")


def fold(text: str) -> str:
    """Text for comparison: case, white space and composed or decomposed characters do not
    matter.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split()).casefold()


def unwrapped(text: str, *, free: bool = False) -> Iterator[str]:
    """The text with less and less wrapping around it, one layer at a time.

    ``free``: an answer in free text, whose brackets and single marks may be its own.
    """
    text = text.strip()
    while text:
        yield text
        text = _without_layer(text, free).strip()


def _without_layer(text: str, free: bool) -> str:
    """The text without its bullet, else its outermost pair of marks, else its final stop, else a
    mark at one end.

    Empty where there is nothing to remove.
    """
    latex = _LATEX.fullmatch(text)
    if latex:
        return latex.group(1)
    bullet = _BULLET.match(text)
    if bullet:
        return text[bullet.end() :]
    first = text[0]
    last = text[-1]
    leading = len(text) - len(text.lstrip(first))
    trailing = len(text) - len(text.rstrip(last))
    if first == last and first in EMPHASIS:
        layer = min(leading, trailing)
        return text[layer:-layer]
    if not free and last in BRACKETS.get(first, "") and last not in text[1:-1]:
        return text[1:-1]
    if last in _FINAL:
        return text[: -trailing if free else -1]
    # "**Answer: A***" leaves "A***"
    if first in EMPHASIS and (leading > 1 or not free):
        return text[min(leading, 2) :]
    if last in EMPHASIS and (trailing > 1 or not free):
        return text[: -min(trailing, 2)]
    return ""
