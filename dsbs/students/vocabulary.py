"""What a student's vocabulary cannot say: T5's own lack braces, ``<``, ``~`` and more, and all read a line break as a space."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsbs.config import StudentSection

_RARE = 0.001  # share of the texts below which lost characters are not worth a word
_SHOWN = 8  # characters named in one message


def lost_in(
    section: StudentSection,
    tokenizer: Any,
    labels: Iterable[str],
    texts: Mapping[str, Sequence[str]],
) -> list[str]:
    """Warnings: of labels that the student could never write first, then of characters that it loses in the other texts.

    ``texts`` maps what they are called ("inputs") to them.
    """
    remedy = (
        "a scratch vocabulary has the characters of the train rows alone"
        if section.is_scratch
        else "use student: {init: scratch}, whose vocabulary is learned from your text, or a student.model with more "
        "characters, such as google/mt5-small"
    )
    warnings = _lost_labels(tokenizer, sorted(set(labels)), remedy)
    for what, said in texts.items():
        unknown, blank, rows = _lost_characters(tokenizer, said)
        if unknown and rows[0] > _RARE:
            warnings.append(
                f"{100 * rows[0]:.1f} % of the {what} have characters that are unknown to the student's tokenizer: "
                f"{_listed(unknown)}; keep them out by task.input or the teacher's prompt, or {remedy}"
            )
        if blank and rows[1] > _RARE:
            warnings.append(
                f"{100 * rows[1]:.1f} % of the {what} have characters that the student takes for a space or for nothing: "
                f"{_listed(blank)}"
            )
    return warnings


def _lost_labels(tokenizer: Any, labels: list[str], remedy: str) -> list[str]:
    written = (
        tokenizer.batch_decode(tokenizer(labels)["input_ids"], skip_special_tokens=True)
        if labels
        else []
    )
    lost = [
        (label, best)
        for label, best in zip(labels, written, strict=True)
        if _plain(label) != _plain(best)
    ]
    if not lost:
        return []
    label, best = lost[0]
    return [
        f"{len(lost)} of {len(labels)} labels can never be written by the student, whose vocabulary lacks some characters: "
        f"{label!r} becomes {best!r}. It is wrong on those rows whatever it learns: rename the labels, or {remedy}"
    ]


def _lost_characters(
    tokenizer: Any, texts: Sequence[str]
) -> tuple[Counter[str], Counter[str], tuple[float, float]]:
    """Characters without a token, and those that are read as blank, each with the texts that have it; both kinds' shares."""
    plain = [
        text if text.isascii() else unicodedata.normalize("NFKC", text) for text in texts
    ]  # as the tokenizer does
    characters = sorted(set[str]().union(*plain) - {" "})
    if not characters:
        return Counter(), Counter(), (0.0, 0.0)
    ids = tokenizer(characters)["input_ids"]
    unknown = {
        c for c, tokens in zip(characters, ids, strict=True) if tokenizer.unk_token_id in tokens
    }
    decoded = tokenizer.batch_decode(ids, skip_special_tokens=True)
    blank = {
        c
        for c, text in zip(characters, decoded, strict=True)
        if c not in unknown and text != c and not text.strip()
    }
    counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    rows = [0, 0]
    if unknown | blank:
        any_lost = re.compile("[" + "".join(map(re.escape, sorted(unknown | blank))) + "]")
        special = re.compile(
            "|".join(map(re.escape, tokenizer.all_special_tokens))
        )  # </s> between two sentences is one token
        for text in plain:
            found = (
                set(any_lost.findall(special.sub("", text)))
                if any_lost.search(text)
                else set[str]()
            )
            for kind, lost in enumerate((unknown, blank)):
                counts[kind].update(found & lost)
                rows[kind] += bool(found & lost)
    return *counts, (rows[0] / len(texts), rows[1] / len(texts))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _listed(counts: Counter[str]) -> str:
    shown = ", ".join(
        f"{character!r} in {count}" for character, count in counts.most_common(_SHOWN)
    )
    return shown + (f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else "")
