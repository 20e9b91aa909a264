"""The label that a rationale concludes with."""

from __future__ import annotations

import re
from collections.abc import Iterable

from dsbs.tasks import Fields, Task

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_ANSWER_IS = re.compile(
    r"\b(?:the|my) (?:final |correct |right )?(?:answer|label|category|class|choice|option)"
    r" (?:is|must be|should be|would be|has to be):? *(.+)$",
    re.IGNORECASE,
)
_SO = re.compile(r"\b(?:so|therefore|thus|hence),? ", re.IGNORECASE)
_IT_IS = re.compile(
    r"(?:it|this|that|the \w+) (?:is|must be|belongs to|goes to) (?:an? |the )?(.+)", re.IGNORECASE
)


def concluded_label(rationale: str, task: Task, fields: Fields) -> str | None:
    """The canonical label that a rationale's last sentence concludes with; None where it states
    none.

    Only a stated conclusion counts: "the answer is …" for any task with distinct answers; for a
    closed set of labels also "so it is …" and a label after a final colon.
    """
    if task.is_free_text or task.has_several_labels:  # a sentence may state one of several
        return None
    sentence = _SENTENCE.split(rationale.strip())[-1].strip().rstrip("\"'”’ ")
    if "(" not in sentence:
        sentence = sentence.rstrip(")")
    answer = _ANSWER_IS.search(sentence)
    if answer:
        label = task.read_label(answer.group(1), fields)
        return label if isinstance(label, str) else None
    if task.label_set is None:
        return None
    labels = {task.label_set.concluded(claim) for claim in _claims(sentence)} - {None}
    return labels.pop() if len(labels) == 1 else None


def _claims(sentence: str) -> Iterable[str]:
    """The parts of a sentence that may state a label."""
    it_is = _IT_IS.fullmatch(_SO.split(sentence)[-1])
    if it_is:
        yield it_is.group(1)
    if ":" in sentence:
        yield sentence.rpartition(":")[2]
