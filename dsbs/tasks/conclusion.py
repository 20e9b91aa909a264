"""The label that a rationale comes to, where it says so in so many words."""

from __future__ import annotations

import re

from dsbs.tasks.base import Fields, Task, fold, tidy

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


def concluded(rationale: str, task: Task, fields: Fields) -> str | None:
    """The canonical label that the rationale's last sentence concludes with; None where it states none that can be read.

    Only a conclusion that is stated counts: "the answer is …" for any task that tells answers apart, and for a closed set
    also "so it is …" and a label after a closing colon.
    """
    if task.is_free_text:
        return None
    sentence = _SENTENCE.split(rationale.strip())[-1].strip().rstrip(".!?\"'”’) ")
    said = _ANSWER_IS.search(sentence)
    if said:
        claim = task.read_label(said.group(1), fields)
        return claim if isinstance(claim, str) else None
    if task.labels is None:
        return None
    by_fold = {fold(known): known for known in task.labels}
    claims = [match.group(1)] if (match := _IT_IS.fullmatch(_SO.split(sentence)[-1])) else []
    claims += [sentence.rpartition(":")[2]] if ":" in sentence else []
    found = {by_fold[key] for claim in claims if (key := fold(tidy(claim))) in by_fold}
    return found.pop() if len(found) == 1 else None
