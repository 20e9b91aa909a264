"""Text of data in Markdown pages: it is shown, and means nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+"
)  # line ends, control characters, half pairs
_TURNING = re.compile(
    "[\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)  # characters that turn the direction of what follows
# What has a meaning in Markdown; the last two parts would make links of bare addresses.
_MEANING = re.compile(r"[\\`*_\[\]|~$@]|<(?=[\w/!?])|&(?=[#\w])|(?<=\w):(?=//)|(?<=www)\.")
_STARTING = re.compile(r"^(?:[-+=#>]|\d+[.)])")  # a list, a heading, a rule, a quotation
_ENTITIES = {"<": "&lt;", "&": "&amp;"}


def one_line(text: str, most: int | None = None) -> str:
    """``text`` without line ends and characters that are not seen, cut after ``most`` characters."""
    plain = " ".join(_TURNING.sub("\ufffd", _UNSEEN.sub(" ", text)).split())
    return plain if most is None or len(plain) <= most else plain[: most - 1].rstrip() + "…"


def escape(text: str, most: int | None = None) -> str:
    """``text`` on one line, as Markdown that shows the very characters, within a line or a table's cell."""
    return _MEANING.sub(
        lambda found: _ENTITIES.get(found[0], "\\" + found[0]), one_line(text, most)
    )


def paragraph(text: str) -> str:
    """The same where it begins a line."""
    return _STARTING.sub(lambda found: f"{found[0][:-1]}\\{found[0][-1]}", escape(text))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; cells are Markdown already."""
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]
