"""Flaws of a rationale that was read: each a reason of rejection, decided from the text alone and never from the gold label."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dsbs.annotation.parse import parse_reply
from dsbs.prompting import Prompt
from dsbs.records.rows import Reason, Sample
from dsbs.tasks.base import Fields, Task
from dsbs.tasks.conclusion import concluded

_SPEAKS_OF_THE_HINT = re.compile(
    r"\bhint(?:s|ed|ing)?\b"
    r"|\b(?:given|provided|supplied|stated|expected|known|gold|correct|right) (?:answer|label)\b"
    r"|\b(?:answer|label) (?:is|was|has been) (?:given|provided|stated|supplied|known|told)\b"
    r"|\b(?:as|we (?:are|were)|i (?:am|was)) (?:told|given|instructed|informed)\b"
    r"|\b(?:since|because|as|given that|knowing that) (?:the|its|your) (?:answer|label) (?:is|must|should)\b"
    r"|\b(?:this|the|your) note\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+")
_COPIED_WORDS = 12  # so long a run in common is no coincidence


def read_sample(
    reply_text: str,
    prompt: Prompt,
    task: Task,
    fields: Fields,
    *,
    question: str,
    min_words: int,
    hint: str | None = None,
    **how: str | None,
) -> Sample:
    """Parse a reply and look for flaws in its rationale; ``hint`` is the hint's text, less the label, where there was one."""
    sample = parse_reply(reply_text, prompt, task, fields, **how)  # type: ignore[arg-type]
    if hint is not None:
        sample = sample.model_copy(update={"hinted": True})
    if sample.label is None:
        return sample
    flaw = _flaw(
        sample.rationale,
        sample.label,
        prompt,
        task,
        fields,
        question=question,
        min_words=min_words,
        hint=hint,
    )
    return sample if flaw is None else sample.model_copy(update={"reason": flaw})


def _flaw(
    rationale: str | None,
    label: str,
    prompt: Prompt,
    task: Task,
    fields: Fields,
    *,
    question: str,
    min_words: int,
    hint: str | None,
) -> Reason | None:
    if rationale is None:
        return (
            None if hint is None else "empty"
        )  # without a rationale a label still teaches; a hinted one was given
    if hint is not None and leaks_hint(rationale, hint, question):
        return "hint-leaked"
    if is_short(rationale, min_words):
        return "too-short"
    if copies(
        rationale, question, [(exemplar.input, exemplar.rationale) for exemplar in prompt.exemplars]
    ):
        return "copies-exemplar"
    if contradicts(rationale, label, task, fields):
        return "contradicts-rationale"
    return None


def is_short(rationale: str, min_words: int) -> bool:
    """Fewer words than ``min_words``; a script without spaces is measured by its characters, four to a word."""
    return len(rationale.split()) < min_words and len(rationale) < 4 * min_words


def copies(rationale: str, question: str, exemplars: Sequence[tuple[Fields, str]]) -> bool:
    """Whether the rationale is an exemplar's, whole or in a run of a dozen words that is most of it.

    An exemplar whose own input is what is asked about may be repeated.
    """
    words = _words(rationale)
    asked = " ".join(_words(question))
    for fields, theirs in exemplars:
        their_words = _words(theirs)
        if len(their_words) < 4 or not _shares_run(words, their_words):
            continue
        texts = [
            " ".join(_words(str(value))) for value in fields.values() if isinstance(value, str)
        ]
        if not texts or not all(text in asked for text in texts):
            return True
    return False


def _shares_run(words: list[str], theirs: list[str]) -> bool:
    if words == theirs:
        return True
    length = max(_COPIED_WORDS, round(0.8 * len(words)))
    if length > min(len(words), len(theirs)):
        return False
    runs = {tuple(theirs[i : i + length]) for i in range(len(theirs) - length + 1)}
    return any(tuple(words[i : i + length]) in runs for i in range(len(words) - length + 1))


def contradicts(rationale: str, label: str, task: Task, fields: Fields) -> bool:
    """Whether the rationale's last sentence concludes with another answer than ``label``."""
    claim = concluded(rationale, task, fields)
    return claim is not None and not task.correct(claim, label)


def leaks_hint(rationale: str, hint: str, question: str) -> bool:
    """Whether a rationale speaks of having been told the answer, or repeats five words in a row of the hint itself.

    Words that the question uses too ("hint", "the correct answer") are the subject and give nothing away.
    """
    asked = " ".join(_words(question))
    if any(
        " ".join(_words(match.group())) not in asked
        for match in _SPEAKS_OF_THE_HINT.finditer(rationale)
    ):
        return True
    words, hint_words = _words(rationale), _words(hint)
    runs = {tuple(hint_words[i : i + 5]) for i in range(len(hint_words) - 4)}
    return any(
        tuple(words[i : i + 5]) in runs and " ".join(words[i : i + 5]) not in asked
        for i in range(max(0, len(words) - 4))
    )


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
