"""Text answers: where rationale and label stand in a reply, by the prompt's anchor or pattern.

With ``order: rationale-first`` the rationale precedes the answer anchor and the label follows it.
With ``order: label-first`` the label follows the anchor, or begins the reply, and the rationale
follows the label. A pattern names both itself.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from dsbs.prompting import Prompt, compiled
from dsbs.records import Reason
from dsbs.tasks import Task
from dsbs.tasks.label_set import LabelSet
from dsbs.tasks.marks import EMPHASIS, unwrapped

MARKUP = " \t\r\n*_#>"
_DANGLING = re.compile(
    r"(?:^|(?<=[.!?,;:\s]))\s*(?:so|therefore|thus|hence|and so|and)\s*,?\s*$", re.IGNORECASE
)
_DECLINES = re.compile(
    r"\W*(?:(?:i'm|i am) (?:very )?(?:sorry|unable)|sorry, "
    r"|i (?:can't|cannot|won't|will not|must decline)|as an ai\b)",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"\W*(?:no[,.:]|(?:wait|hmm+|but|however|alternatively|actually|hold on|or|and|maybe|perhaps"
    r"|rather|on second thought|correction)\b)",
    re.IGNORECASE,
)
# what a model writes over its explanation: "Reasoning:", "**Explanation:**"
_HEADING = re.compile(
    r"(?:(?:my|the|a|brief|short)\s+)*(?:reason(?:s|ing|ings)?|rationale|explanation|justification)"
    r"[*_]*(?:\s*[:：][*_]*\s*|[ \t]*\n\s*)",
    re.IGNORECASE,
)
# (?<!\s): long runs of spaces are read once, not once from each space
# where a label may end within a line: "neutral. The premise …", "neutral, because …"; behind the
# other marks there may be a list of labels
_SENTENCE_END = r"\.\s+|(?:[,;]|(?<!\s))\s+(?=(?:because|since|as)\b)"
_LABEL_END = re.compile(rf"(?P<sure>{_SENTENCE_END})|[:,]\s+|(?<!\s)\s+[-–—]+\s+", re.IGNORECASE)
# lines without words, and the fence of a code block
_RULES = re.compile(r"(?:\s*(?:[-=*_]{3,}|`{3,}\w*)[ \t]*(?:\n|\Z))+")
_LIST_NUMBER = re.compile(r"\s*\d+[.)]\s+")
_FORM = re.compile(r"\{\{-?\s*label\b[^}]*\}\}([^{}]*)\{\{-?\s*rationale\b")
_MEMBER = re.compile(r'"\s*:\s*"\Z')  # before the text of a JSON member's value
_MIN_REST = 3  # words after a label in its line, to be its explanation
_MAX_LABELS = 16  # places in a reply that are compared


@dataclass(frozen=True, slots=True)
class Answer:
    """The texts of an answer, or why there is none.

    ``label_span`` is where the label stands in the reply's turn, without a JSON string's quotes.
    ``repeated`` are later texts of the reply that should give the same label.
    """

    rationale: str = ""
    label: str = ""
    label_span: tuple[int, int] = (0, 0)
    reason: Reason | None = None
    repeated: tuple[str, ...] = ()


def read_text_answer(
    turn: str, prompt: Prompt, task: Task | None, *, may_be_cut: bool = False
) -> Answer:
    """The answer in a reply's first turn. ``may_be_cut`` decides why there is none."""
    if prompt.pattern is not None:
        answer = _by_pattern(turn, prompt.pattern)
    elif prompt.order == "label-first":
        answer = _label_first(turn, prompt, task)
    else:
        answer = _rationale_first(turn, prompt, task)
    if answer is not None:
        return answer
    if _DECLINES.match(turn.replace("’", "'")):
        return Answer(reason="refused")
    return Answer(reason="truncated" if may_be_cut else "unparsed")


def _rationale_first(turn: str, prompt: Prompt, task: Task | None) -> Answer | None:
    start, anchor = find_anchor(turn, prompt.anchor, task)
    if start < 0:
        return None
    rationale = _DANGLING.sub("", turn[:start].strip(MARKUP)).strip(MARKUP)
    end = start + len(anchor)
    label = _without_anchor_marks(turn[:start], anchor, turn[end:])
    begin = len(turn) - len(turn[end:].lstrip())
    length = _label_length(turn[begin:], task)
    return Answer(rationale, label, (begin, begin + length))


def find_anchor(turn: str, anchors: tuple[str, ...], task: Task | None = None) -> tuple[int, str]:
    """The last occurrence of the first anchor that occurs, and its text; -1 without one.

    The last one, because a rationale may mention "the answer" before it is given. An earlier one,
    if all that follows it is a label, which then contains the anchor itself; with labels in free
    text, one that begins a line and whose label goes on to the last one.
    """
    matches = _occurrences(turn, anchors)
    if matches and task is not None and task.is_free_text:
        last = matches[-1]
        for match in reversed(matches[:-1]):
            if _begins_line(turn, match.start()) and _has_in_label(turn, match, last, task):
                last = match
        return last.start(), last.group()
    labels = None if task is None else task.label_set
    for match in matches[:-1]:
        layers = unwrapped(turn[match.end() :])
        if labels is not None and any(labels.spelled(layer) for layer in layers):
            return match.start(), match.group()
    if matches:
        return matches[-1].start(), matches[-1].group()
    return -1, ""


def _has_in_label(turn: str, match: re.Match[str], later: re.Match[str], task: Task) -> bool:
    """Whether the free text after one anchor contains the other: in its line or, of labels with
    several lines, before their end.
    """
    text = turn[match.end() :]
    end = task.label_end(text)
    if end is None:
        return "\n" not in turn[match.end() : later.start()]
    return task.begins_label(text) and match.end() + end >= later.end()


def _occurrences(turn: str, anchors: tuple[str, ...]) -> list[re.Match[str]]:
    """The places of the first anchor that occurs."""
    for anchor in anchors:
        matches = list(_anchor_expression(anchor).finditer(turn))
        if matches:
            return matches
    return []


@lru_cache(maxsize=16)
def _anchor_expression(anchor: str) -> re.Pattern[str]:
    """An anchor in any case; its colon may be full-width, and emphasis may end before it."""
    name = anchor.removesuffix(":")
    colon = "" if name == anchor else r"(?:[*_]{0,3})[:：]"
    return re.compile(re.escape(name) + colon, re.IGNORECASE)


def _without_anchor_marks(before: str, anchor: str, answer: str) -> str:
    """The answer without the mark that closes emphasis begun before the anchor: "**Answer:** A" or
    "*Answer: A*".
    """
    mark = before[len(before.rstrip(EMPHASIS)) :]
    line, line_break, rest = answer.partition("\n")
    if not mark or mark in anchor:
        return answer
    if line.startswith(mark):
        return answer[len(mark) :]
    return line.rstrip().removesuffix(mark) + line_break + rest


# --- the label first


def _label_first(turn: str, prompt: Prompt, task: Task | None) -> Answer | None:
    """The label after the first anchor, or at the beginning without one; then the rationale."""
    anchors = _occurrences(turn, prompt.anchor)
    if prompt.anchor and not anchors:
        return None
    before = anchor = ""
    begin = 0
    if anchors:
        before = turn[: anchors[0].start()]
        anchor = anchors[0].group()
        begin = anchors[0].end()
    labels = None if task is None else task.label_set
    label_end, rationale_begin = _bounds(turn, begin, prompt, task)
    label = _without_anchor_marks(before, anchor, turn[begin:label_end])
    line = turn[begin:label_end].strip()
    if not anchors and _DECLINES.match(line) and (labels is None or not labels.lookup(line)):
        return None
    span_begin = turn.find(line, begin)
    later = [match for match in anchors[1:_MAX_LABELS] if match.start() >= rationale_begin]
    in_lines = [match for match in later if _begins_line(turn, match.start())]
    if task is not None and task.is_free_text:
        later = in_lines  # within a sentence, an anchor is rather the rationale's own
    rationale_end = in_lines[0].start() if in_lines else len(turn)
    return Answer(
        _explanation(turn[rationale_begin:rationale_end]),
        label,
        (span_begin, span_begin + len(line)),
        repeated=tuple(turn[match.end() :] for match in later),
    )


def _begins_line(turn: str, position: int) -> bool:
    return not turn[:position].rpartition("\n")[2].strip(MARKUP)


def _label_length(text: str, task: Task | None) -> int:
    """The length of the label that ``text`` begins with: its line, or its lines."""
    end = None if task is None else task.label_end(text)
    label = text.partition("\n")[0] if end is None else text[:end]
    return len(label.rstrip())


def _bounds(turn: str, begin: int, prompt: Prompt, task: Task | None) -> tuple[int, int]:
    """Where the label after ``begin`` ends, and where its rationale begins."""
    heading, separator = _form(prompt.answer)
    if heading:
        match = _heading_of(turn, begin, heading, task)
        if match is not None and turn[begin : match.start()].strip(MARKUP):
            return match.start(), match.end()
    rules = _RULES.match(turn, begin)
    if rules is not None:
        begin = rules.end()
    rest = turn[begin:]
    begin += len(rest) - len(rest.lstrip(MARKUP))
    end = None if task is None else task.label_end(turn[begin:])
    if end is not None:
        return begin + end, begin + end
    labels = None if task is None else task.label_set
    if labels is not None:
        lines = turn[begin:].split("\n")
        for count in labels.line_counts:
            text = "\n".join(lines[:count])
            if any(labels.spelled(layer) for layer in unwrapped(text)):
                return begin + len(text), begin + len(text)
    line = turn[begin:].partition("\n")[0]
    label_end, rationale_begin = _bounds_in_line(line, separator, labels)
    return begin + label_end, begin + rationale_begin


def _heading_of(turn: str, begin: int, heading: str, task: Task | None) -> re.Match[str] | None:
    """The heading of the rationale: the first one after ``begin``.

    A label in free text may contain it: then the first that begins a line after such a label.
    """
    expression = re.compile(rf"(?<!\w){re.escape(heading)}", re.IGNORECASE)
    matches = list(expression.finditer(turn, begin))
    if task is not None and task.is_free_text:
        text = turn[begin:]
        label_end = task.label_end(text) if task.begins_label(text) else None
        first = begin if label_end is None else begin + label_end
        for match in matches:
            if match.start() >= first and _begins_line(turn, match.start()):
                return match
    return matches[0] if matches else None


def _bounds_in_line(line: str, separator: str, labels: LabelSet | None) -> tuple[int, int]:
    """The same within a line; all of it is the label where no explanation follows there."""
    ends = list(_LABEL_END.finditer(line))
    own_ends = []
    if separator:
        own_ends = list(re.finditer(rf"(?:(?<!\s)\s+)?{re.escape(separator)}(?=\s)\s*", line))
    if labels is None:
        if own_ends and line[own_ends[0].end() :]:
            return own_ends[0].span()
    elif labels.lookup(line) is None:
        for end in sorted([*ends, *own_ends], key=lambda match: -match.end()):
            explanation = line[end.end() :]
            label = labels.lookup(line[: end.start()])
            is_explained = len(explanation.split()) >= _MIN_REST
            if label is None or not is_explained or _CORRECTION.match(explanation):
                continue
            is_sure = end in own_ends or end["sure"] is not None
            if is_sure or labels.not_negated(explanation) <= {label}:
                return end.span()
    return len(line), len(line)


@lru_cache(maxsize=16)
def _form(answer: str) -> tuple[str, str]:
    """The heading of the rationale in an answer's template ("Reason:"), and what else separates
    it from a label in the same line ("-").
    """
    match = _FORM.search(answer)
    if match is None:
        return "", ""
    before, line_break, last = match.group(1).rpartition("\n")
    if any(character.isalpha() for character in last):
        return last.strip(" \t.,;"), ""
    return "", "" if line_break else (before + last).strip()


def _explanation(text: str) -> str:
    """A rationale that follows its label, without a heading."""
    rules = _RULES.match(text)
    if rules is not None:
        text = text[rules.end() :]
    text = text.strip(MARKUP)
    heading = _HEADING.match(text)
    if heading is not None:
        text = text[heading.end() :]
    return text.strip(MARKUP)


def gives_another_label(text: str, label: str, labels: LabelSet) -> bool:
    """Whether the text behind a label begins with another one: in a line of its own, or as a
    correction ("Actually, …").
    """
    line = text.partition("\n")[0]
    other = labels.lookup(line) or labels.lookup(_LIST_NUMBER.sub("", line, count=1))
    if other is not None and other != label:
        return True
    rest = text
    while match := _CORRECTION.match(rest):
        rest = rest[match.end() :]
    return rest != text and not labels.not_negated(rest) <= {label}


# --- a pattern


def _by_pattern(turn: str, pattern: str) -> Answer | None:
    """The groups of the pattern's first match; the labels of later ones are ``repeated``."""
    expression = compiled(pattern)
    groups = expression.groupindex
    # lone surrogates are no text for RE2; a replacement keeps every position
    text = turn.encode("utf-8", "replace").decode()
    matches = list(islice(expression.finditer(text), _MAX_LABELS))
    labels = [match.span(groups["label"]) for match in matches]
    if not labels or labels[0][0] < 0:
        return None
    rationale = ""
    if "rationale" in groups:
        start, end = matches[0].span(groups["rationale"])
        rationale = _group_text(turn, max(start, 0), max(end, 0)).strip(MARKUP)
    repeated = tuple(_group_text(turn, *span) for span in labels[1:] if span[0] >= 0)
    return Answer(rationale, _group_text(turn, *labels[0]), labels[0], repeated=repeated)


def _group_text(turn: str, start: int, end: int) -> str:
    """What a group matched; the value of a JSON member without its escapes, such as ``\\u00e9``."""
    text = turn[start:end]
    is_member = _MEMBER.search(turn[max(0, start - 40) : start]) and turn[end : end + 1] == '"'
    if "\\" in text and is_member:
        with suppress(ValueError):
            return str(json.loads(f'"{text}"', strict=False))
    return text
