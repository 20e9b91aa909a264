"""Formatting for people: numbers, percentages, intervals, prices, durations, and Markdown.

Shares, accuracies and their differences are fractions in [0, 1]; they are shown in percent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

ABSENT = "–"  # a table cell without a value
_MINUS = "\u2212"

Interval = tuple[float, float]


# --- numbers


def percent(share: float) -> str:
    """``73.2%``."""
    return f"{percent_number(share)}%"


def percent_number(share: float) -> str:
    """``73.2``, for a column whose heading has the per cent sign."""
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """A signed difference of shares: ``+4.2 points``."""
    return f"{points_number(difference)} points"


def points_number(difference: float) -> str:
    """``+4.2``, for a column that names the unit. A difference that rounds to zero is ``+0.0``."""
    rounded = round(100 * difference, 1) + 0.0  # adding 0.0 turns -0.0 into 0.0
    return signed(rounded, digits=1)


def signed(value: float, digits: int) -> str:
    """``+0.042`` or ``−0.042``, with a minus sign (U+2212) instead of a hyphen."""
    return f"{value:+.{digits}f}".replace("-", _MINUS)


def interval(ends: Interval) -> str:
    """The ends of a share's interval in percent: ``[45.2, 58.5]``."""
    return f"[{percent_number(ends[0])}, {percent_number(ends[1])}]"


def signed_interval(ends: Interval) -> str:
    """The ends of a difference's interval in points: ``[−3.8, +12.3]``."""
    return f"[{points_number(ends[0])}, {points_number(ends[1])}]"


def confidence_interval(ends: Interval) -> str:
    """``95% CI [45.2, 58.5]``, in percent."""
    return f"95% CI {interval(ends)}"


def signed_confidence_interval(ends: Interval) -> str:
    """``95% CI [−3.8, +12.3]``, in points."""
    return f"95% CI {signed_interval(ends)}"


class Rate(Protocol):
    """A share with its 95% interval."""

    @property
    def value(self) -> float: ...
    @property
    def ci95(self) -> Interval: ...


def rate(share: Rate | None) -> str:
    """``73.2% (95% CI [72.3, 74.0])``, or a dash for None."""
    if share is None:
        return ABSENT
    return f"{percent(share.value)} ({confidence_interval(share.ci95)})"


def p_value(p: float) -> str:
    """``p = .71`` or ``p < .001``."""
    number = p_number(p)
    return f"p {number}" if number.startswith("<") else f"p = {number}"


def p_number(p: float) -> str:
    """``.71``, ``.004`` or ``< .001``, for a column of p values."""
    if p < 0.001:
        return "< .001"
    digits = 2 if p >= 0.1 else 3
    return f"{p:.{digits}f}".removeprefix("0")


def count(number: int, noun: str, plural: str | None = None) -> str:
    """``1 row``, ``1,234 rows``. ``plural`` is for nouns that take more than an s."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {plural or noun + 's'}"


def integer(number: int | None) -> str:
    """``1,234``, or a dash for None."""
    return ABSENT if number is None else f"{number:,}"


def listing(counts: dict[str, int]) -> str:
    """Counts by name, the largest first: ``no label 12, no rationale 3``."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{name} {number:,}" for name, number in ordered)


def sentence_list(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"


def dollars(usd: float | None) -> str:
    """``$12.30``; below ten cents with two significant digits, ``$0.00012``. None: unknown."""
    if usd is None:
        return "price unknown"
    if usd == 0 or usd >= 0.0995:
        return f"${usd:,.2f}"
    return f"${float(f'{usd:.2g}'):.12f}".rstrip("0")


def duration(seconds: float) -> str:
    """``2.5 s``, ``48 s``, ``12 min`` or ``3.1 h``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def milliseconds(time_ms: float) -> str:
    """``26.6 ms``: three significant digits, and never fewer than the integer part."""
    return f"{milliseconds_number(time_ms)} ms"


def milliseconds_number(time_ms: float) -> str:
    """``26.6``, for a column that names the unit."""
    return f"{time_ms:,.0f}" if time_ms >= 100 else f"{time_ms:.3g}"


def megabytes(size_mb: float) -> str:
    """``1,204.5 MB``, in units of 10^6 bytes."""
    return f"{size_mb:,.1f} MB"


def parameter_count(parameters: int) -> str:
    """``60.5 M``."""
    return f"{parameters / 1e6:,.1f} M"


# --- Markdown

# Line ends, control characters, halves of surrogate pairs.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
# Characters that change the direction of the text after them.
_BIDIRECTIONAL = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# Characters with a meaning in Markdown; the last two alternatives would turn addresses into links.
_SPECIAL = re.compile(r"[\\`*_\[\]|~$@]|<(?=[\w/!?])|&(?=[#\w])|(?<=\w):(?=//)|(?<=www)\.")
# At the start of a line: a list, a heading, a rule or a quotation.
_LINE_START = re.compile(r"^(?:[-+=#>]|\d+[.)])")
_ENTITIES = {"<": "&lt;", "&": "&amp;"}


def one_line(text: str, max_length: int | None = None) -> str:
    """``text`` without line ends and invisible characters, cut to ``max_length`` characters."""
    visible = _INVISIBLE.sub(" ", text)
    line = " ".join(_BIDIRECTIONAL.sub("\ufffd", visible).split())
    if max_length is None or len(line) <= max_length:
        return line
    return line[: max_length - 1].rstrip() + "…"


def escape_markdown(text: str, max_length: int | None = None) -> str:
    """``text`` on one line, escaped so that Markdown shows it literally in a line or table cell."""
    return _SPECIAL.sub(
        lambda match: _ENTITIES.get(match[0], "\\" + match[0]), one_line(text, max_length)
    )


def markdown_paragraph(text: str) -> str:
    """``text`` escaped for the start of a line."""
    return _LINE_START.sub(lambda match: f"{match[0][:-1]}\\{match[0][-1]}", escape_markdown(text))


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table. The cells have to be Markdown already."""
    rule = ["---"] * len(headings)
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]


def setting_text(value: float | Mapping[str, float]) -> str:
    """A tuned value: a number, or how λ is measured (``balanced-0.5-every-20``)."""
    if isinstance(value, Mapping):
        return f"balanced-{value['share']:g}-every-{value['every']:g}"
    return f"{value:g}"
