"""Multilabel: any number of labels of a closed set, for one row.

A label is written as the row's labels in alphabetical order, joined by "; ", or "none".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsbs.config import TaskSection
from dsbs.errors import UserError
from dsbs.records import Unreadable
from dsbs.tasks import Fields, label_listing
from dsbs.tasks.label_set import LabelSet
from dsbs.tasks.marks import tidy
from dsbs.tasks.own_data import OwnDataTask

SEPARATOR = "; "
NONE = "none"
_NONE_WORDS = frozenset({"none", "[]", "no label", "no labels", "none of them", "none of these"})
_BULLET = re.compile(r"^\s*(?:[-–—•*]|\d+[.)])\s+")
_STRONG = re.compile(r"[;|\t；]")
_FENCE = re.compile(r"\s*```\w*\s*")  # the line that begins or ends a code block
_WEAK = re.compile(r"\s*[,/&+、，]\s*(?:and\s+)?|\s+and\s+", re.IGNORECASE)
_MAX_PIECES = 40  # of a reply


class Multilabel(OwnDataTask):
    goal = "Decide which labels fit the text."

    def __init__(self, section: TaskSection) -> None:
        super().__init__(section)
        assert section.labels is not None  # checked by the recipe
        self._label_set = LabelSet(section.labels)
        self._separator = section.columns.get("separator")

    @property
    def head_labels(self) -> tuple[str, ...]:
        return self._label_set.labels

    @property
    def has_several_labels(self) -> bool:
        return True

    def value(self, label: str) -> list[str]:
        return [] if label == NONE else label.split(SEPARATOR)

    def label_of(self, labels: Sequence[str]) -> str:
        """The written form of a row's labels."""
        return SEPARATOR.join(sorted(set(labels))) or NONE

    def choose(
        self,
        labels: Sequence[str],
        shares: Sequence[float],
        thresholds: Mapping[str, float | None] | None = None,
    ) -> str:
        """All labels whose probability reaches their threshold. One of None is never reached."""
        reached = []
        for label, share in zip(labels, shares, strict=True):
            threshold = 0.5 if thresholds is None else thresholds.get(label, 0.5)
            if threshold is not None and share >= threshold:
                reached.append(label)
        return self.label_of(reached)

    def probability_of(self, label: str, distribution: Mapping[str, float]) -> float | None:
        """That of the least sure label: of having it where it is given, else of not having it.

        An upper bound of the probability that all are right.
        """
        labels = set(self.value(label))
        return min(
            (share if name in labels else 1 - share for name, share in distribution.items()),
            default=None,
        )

    def classes(self, label: str) -> tuple[str, ...]:
        """The row's labels; a row without one belongs to a class of its own."""
        return tuple(self.value(label)) or (NONE,)

    @property
    def part_names(self) -> tuple[str, ...]:
        return self.head_labels

    def parts(self, label: str) -> dict[str, str | None]:
        """Each possible label: its name where the row has it."""
        labels = set(self.value(label))
        return {name: name if name in labels else None for name in self.head_labels}

    def label_of_parts(self, parts: Mapping[str, str | None]) -> str:
        return self.label_of([name for name, value in parts.items() if value is not None])

    def label_schema(self) -> dict[str, Any]:
        return {"type": "array", "items": {"type": "string", "enum": list(self.head_labels)}}

    def json_text(self, value: Any) -> str | None:
        if isinstance(value, list):
            return json.dumps(value, ensure_ascii=False)
        return super().json_text(value)

    def answer_form(self) -> tuple[str, str]:
        listing = label_listing(self.head_labels, "Each label that applies is one of")
        return f"{listing}\nGive all labels that apply, or none.", "<labels, separated by ;>"

    def json_placeholder(self) -> list[str]:
        return ["<each label that applies>"]

    def written_labels(self) -> tuple[str, ...]:
        return (*self.head_labels, NONE)

    def gold_cell(self, value: Any, name: str, where: str) -> Any:
        """A list as it is; a cell of text as the list that it holds."""
        if isinstance(value, list | tuple):
            return list(value)
        text = super().gold_cell(value, name, where)
        if isinstance(text, str) and self._separator and _json_list(text) is None:
            return self._items(text, self._separator)
        return text

    def gold(self, value: Any, fields: Fields, where: str) -> str:
        if not isinstance(value, list):
            items = _json_list(str(value))
            value = self._items(str(value), SEPARATOR.strip()) if items is None else items
        if self._means_none(value):
            return NONE
        labels = [self._label_set.of_value(item) for item in value]
        for item, label in zip(value, labels, strict=True):
            if label is None:
                raise UserError(
                    f"{where}: {str(item)[:60]!r} is not one of the task's labels",
                    hint="fix the row, or add the label to task.labels; a cell with several labels "
                    'separates them by ; or task.columns.separator, or is JSON: ["red", "blue"]',
                )
        return self.label_of([label for label in labels if label is not None])

    def read_label(self, text: str, fields: Fields) -> str | Unreadable:
        pieces = text.strip().split(SEPARATOR)
        spelled = [self._label_set.spelled(piece) for piece in pieces]
        if None not in spelled:
            return self.label_of([label for label in spelled if label is not None])
        answer = text[slice(*self._answer_span(text))]
        if not answer:
            return Unreadable("empty")
        items = _json_list(answer)
        if self._means_none([answer] if items is None else items):
            return NONE
        labels: list[str] = []
        if items is not None:
            for item in items:
                find = self._label_set.lookup if isinstance(item, str) else self._label_set.of_value
                label = find(item)
                if label is None:
                    return Unreadable("label-outside-set", str(item))
                labels.append(label)
            return self.label_of(labels)
        for piece in filter(self._says_something, self._pieces(answer)):
            in_piece = self._labels_in(piece)
            if isinstance(in_piece, Unreadable):
                return in_piece
            labels += in_piece
        return self.label_of(labels) if labels else Unreadable("empty")

    def _pieces(self, answer: str) -> Iterator[str]:
        """The lines of a list without bullets, or what is between the marks in a line."""
        for line in answer.split("\n"):
            label = _BULLET.sub("", line, count=1).strip()
            if self._label_set.spelled(label) is not None:
                yield label
                continue
            for piece in _STRONG.split(line):
                yield _BULLET.sub("", piece, count=1).strip()

    def _says_something(self, text: str) -> bool:
        says = bool(tidy(text)) and not _FENCE.fullmatch(text)
        return says or self._label_set.spelled(text) is not None

    def _items(self, text: str, separator: str) -> list[str]:
        if self._means_none([text]):
            return []
        return [part.strip() for part in text.split(separator) if part.strip()]

    def _means_none(self, items: Sequence[Any]) -> bool:
        """Whether a list is empty, or has only a phrase that stands for no label."""
        if len(items) != 1 or not isinstance(items[0], str):
            return not items
        phrase = items[0]
        return tidy(phrase).casefold() in _NONE_WORDS and self._label_set.lookup(phrase) is None

    def label_end(self, text: str) -> int:
        return self._answer_span(text)[1]

    def _answer_span(self, text: str) -> tuple[int, int]:
        """Where the answer's first line is, with the lines below it that go on with its list: each
        a bullet or a label.
        """
        lines = text.split("\n")
        begin = 0
        while lines and not self._says_something(lines[0]):
            begin += len(lines.pop(0)) + 1
        answer = lines[:1]
        is_open = "".join(answer).lstrip().startswith("[") and "]" not in "".join(answer)
        for line in lines[1:]:
            goes_on = is_open or answer[-1].rstrip().endswith((",", ";")) or _BULLET.match(line)
            if not line.strip() or not (goes_on or self._label_set.lookup(line)):
                break
            answer.append(line)
            is_open = is_open and "]" not in line
        return begin, begin + len("\n".join(answer))

    def _labels_in(self, piece: str) -> list[str] | Unreadable:
        """The labels of a piece that may be a list with commas: in the only way to read it."""
        label = self._label_set.lookup(piece)
        marks = list(_WEAK.finditer(piece))
        if label is not None and (not marks or self._label_set.spelled(piece) is not None):
            return [label]
        if len(marks) > _MAX_PIECES:
            return Unreadable("label-outside-set", tidy(piece))
        readings = self._readings(piece, marks)
        if len(readings) > 1:
            return Unreadable("several-answers", tidy(piece))
        if readings:
            return sorted(readings.pop())
        return [label] if label is not None else Unreadable("label-outside-set", tidy(piece))

    def _readings(self, piece: str, marks: Sequence[re.Match[str]]) -> set[frozenset[str]]:
        """The sets of labels as which a list can be read, with a label between any two marks."""
        starts = [0, *(mark.end() for mark in marks)]
        ends = [*(mark.start() for mark in marks), len(piece)]
        # of the text from each start on; two of them are as good as more
        readings: list[set[frozenset[str]]] = [set() for _ in starts] + [{frozenset()}]
        for first in reversed(range(len(starts))):
            if not piece[starts[first] :].strip():
                readings[first].add(frozenset())
            for last in range(first, len(ends)):
                label = self._label_set.lookup(piece[starts[first] : ends[last]])
                if label is not None and len(readings[first]) < 2:
                    readings[first] |= {rest | {label} for rest in readings[last + 1]}
        return readings[0]


def _json_list(text: str) -> list[Any] | None:
    text = text.strip().strip("`").strip()
    if not text.startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None
