"""Raw replies into rationale and label. Pure: a better parser costs nothing, since the replies are kept."""

from __future__ import annotations

import re
from typing import Literal

from dsbs.prompting import Prompt
from dsbs.records.rows import Reason, Sample, Unread
from dsbs.tasks.base import Fields, Task

_DANGLING = re.compile(
    r"(?:^|(?<=[.!?,;:\s]))\s*(?:so|therefore|thus|hence|and so|and)\s*,?\s*$", re.IGNORECASE
)
_DECLINES = re.compile(
    r"\W*(?:(?:i'm|i am) (?:very )?(?:sorry|unable)|sorry, |i (?:can't|cannot|won't|will not|must decline)|as an ai\b)",
    re.IGNORECASE,
)
_MARKUP = " \t\r\n*_#>"
_THINKING = re.compile(
    r"\s*<(think|thinking|reasoning)>(.*?)(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE
)


def first_turn(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The reply up to where the model begins an example of its own, and whether it did begin one.

    Models that complete text run on into invented examples, whose answers must not be taken for this one's. A beginning of
    a stop string at the very end is such a start that the budget cut.
    """
    text = "\n" * text.startswith("\n") + text.lstrip(
        "\n"
    )  # a stop that begins a line may begin the reply
    at = min((found for mark in stop if (found := text.find(mark)) >= 0), default=-1)
    if at >= 0:
        return text[:at].strip("\n").rstrip(), True
    text = text.lstrip("\n")
    for mark in stop:
        for length in range(len(mark) - 1, len(mark) - len(mark.lstrip()), -1):
            if text.endswith(mark[:length]):
                return text[:-length].rstrip(), True
    return text.rstrip(), False


def parse_reply(
    text: str,
    prompt: Prompt,
    task: Task,
    fields: Fields,
    finish_reason: str | None = None,
    *,
    reasoning: str | None = None,
    rationale_from: Literal["visible", "reasoning"] = "visible",
) -> Sample:
    """Read the first turn of a reply: what stands before the answer anchor is the rationale, what follows the label.

    A reasoning model says its ``reasoning`` beside the text; it is the rationale where ``rationale_from`` asks for it.
    """

    def sample(label: str | None, rationale: str | None, unread: Unread | None) -> Sample:
        return Sample(
            text=text,
            label=label,
            rationale=rationale or None,
            reason=None if unread is None else unread.reason,
            finish_reason=finish_reason,
        )

    spoken, thought = said(text)
    reasoning = reasoning or thought
    turn, ran_on = first_turn(spoken, prompt.stop)
    if finish_reason == "content_filter":
        return sample(None, None, Unread("refused"))
    if not turn.strip(_MARKUP):
        cut_short: Reason = "spent-on-reasoning" if reasoning else "truncated"
        return sample(None, None, Unread(cut_short if finish_reason == "length" else "empty"))
    cut = not ran_on and (
        finish_reason == "length" or (finish_reason is None and turn[-1] not in ".!?)\"'")
    )
    at, anchor = find_anchor(turn, prompt.anchor)
    if at < 0:
        if _DECLINES.match(turn.replace("’", "'")):
            return sample(None, None, Unread("refused"))
        return sample(None, None, Unread("truncated" if cut else "unparsed"))
    rationale = _DANGLING.sub("", turn[:at].strip(_MARKUP)).strip(_MARKUP)
    if rationale_from == "reasoning":
        rationale = (reasoning or "").strip()
    answer = turn[at + len(anchor) :]
    label = task.read_label(answer, fields)
    if isinstance(label, Unread):
        lost = (
            finish_reason == "length"
            and not ran_on
            and label.reason in ("empty", "unparsed", "label-outside-set")
        )
        return sample(None, rationale, Unread("truncated") if lost else label)
    if (
        finish_reason == "length"
        and not ran_on
        and any(other != label and other.startswith(label) for other in task.labels or ())
    ):
        return sample(
            None, rationale, Unread("truncated")
        )  # "card" may have been going to be "card fraud"
    return sample(label, rationale, None)  # without a rationale, a label still teaches


def said(text: str) -> tuple[str, str | None]:
    """The visible part of a reply, and the reasoning that some servers leave before it in tags of its own."""
    match = _THINKING.match(text)
    return (text, None) if match is None else (text[match.end() :], match.group(2).strip() or None)


def find_anchor(turn: str, anchors: tuple[str, ...]) -> tuple[int, str]:
    """The last place of the first anchor that occurs: a rationale may speak of "the answer" before it gives one."""
    for anchor in anchors:
        places = [
            (match.start(), match.group())
            for match in re.finditer(re.escape(anchor), turn, re.IGNORECASE)
        ]
        if places:
            return places[-1]
    return -1, ""
