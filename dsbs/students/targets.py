"""Targets: the text that a student learns to write, and its parts."""

from __future__ import annotations

import re
from functools import cache

from dsbs.students.card import SECOND_PART, Target


def compose_target(target: Target, label: str | None, rationale: str | None) -> str | None:
    """The text that a student learns to write; None where the row lacks a part that is needed.

    In one sequence, a label without a rationale is written alone. `split_target` reads the same
    parts, even where one of them has the marker that stands between them.
    """
    if target == "label":
        return label
    if target == "rationale":
        return rationale
    if label is None:
        return None
    marker = SECOND_PART[target]
    label, rationale = _escaped(label, marker), _escaped(rationale or "", marker)
    if target == "rationale-then-label":
        return f"{rationale} {marker} {label}".strip()
    return f"{label} {marker} {rationale}" if rationale else label


def _escaped(text: str, marker: str) -> str:
    """A part without the marker: each becomes one with an apostrophe, "Answer':".

    One with apostrophes gets one more, so that `_unescaped` restores the part.
    """
    return _marks(marker).sub(r"\g<word>'\g<apostrophes>:", text)


def _unescaped(text: str, marker: str) -> str:
    return _marks(marker).sub(lambda match: f"{match['word']}{match['apostrophes'][1:]}:", text)


@cache
def _marks(marker: str) -> re.Pattern[str]:
    """The marker with any number of apostrophes before its colon."""
    return re.compile(rf"(?P<word>{re.escape(marker[:-1])})(?P<apostrophes>'*):")


def split_target(target: Target, text: str) -> tuple[str, str | None]:
    """Split a student's text into label and rationale.

    The label is empty where a sequence ended before it.
    """
    if target not in SECOND_PART:
        return text, None
    marker = SECOND_PART[target]
    if target == "label-then-rationale":
        label, _, rationale = text.partition(marker)
    elif marker in text:
        rationale, _, label = text.rpartition(marker)
    else:
        label, rationale = "", text
    rationale = _unescaped(rationale, marker).strip()
    return _unescaped(label, marker).strip(), rationale or None


def has_label_part(target: Target, text: str) -> bool:
    """Whether a text of one sequence got as far as its second part's marker."""
    return SECOND_PART[target] in text
