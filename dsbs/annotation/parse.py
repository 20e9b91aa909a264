"""Parsing: raw replies to labels, rationales and rejection reasons.

Parsing is pure and costs nothing to repeat, since raw replies are stored. A rationale's flaws are
decided from the text alone, never from the gold label.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from dsbs.annotation.backends.faults import is_unknown_reason
from dsbs.annotation.json_answer import read_json_answer
from dsbs.annotation.text_answer import MARKUP, Answer, gives_another_label, read_text_answer
from dsbs.annotation.thoughts import split_thoughts
from dsbs.prompting import Prompt
from dsbs.records import Reason, Sample, Unreadable
from dsbs.tasks import Fields, Task
from dsbs.tasks.conclusion import concluded_label

RationaleFrom = Literal["visible", "reasoning"]

_DOUBTS = re.compile(
    r"\W*(?:wait|hmm+|but|however|alternatively|actually|hold on|let me|let's|no[,.]|or\b"
    r"|ok(?:ay)?\b|maybe|perhaps|i (?:should|need|think|must|will))",
    re.IGNORECASE,
)
_WORDS_AROUND_LABEL = 3  # "(b) revolving door.", "84 / 2 = 42"


def parse_reply(
    text: str,
    prompt: Prompt,
    task: Task,
    fields: Fields,
    finish_reason: str | None = None,
    *,
    reasoning: str | None = None,
    rationale_from: RationaleFrom = "visible",
) -> Sample:
    """Read a reply's first turn, in the prompt's form.

    ``reasoning`` is a reasoning model's separate text; it is the rationale where ``rationale_from``
    says so.
    """

    def sample(label: str | None, rationale: str | None, reason: Reason | None) -> Sample:
        return Sample(
            text=text,
            label=label,
            rationale=rationale or None,
            reason=reason,
            finish_reason=finish_reason,
        )

    visible, thoughts = split_thoughts(text, task.label_set)
    reasoning = reasoning or thoughts
    turn, ran_on = first_turn(visible, prompt.stop, prompt.anchor)
    out_of_tokens = finish_reason == "length"
    if finish_reason == "content_filter":
        return sample(None, None, "refused")
    if not turn.strip(MARKUP):
        if not out_of_tokens:
            return sample(None, None, "empty")
        return sample(None, None, "spent-on-reasoning" if reasoning else "truncated")
    may_be_cut = out_of_tokens and not ran_on
    ends_openly = finish_reason is None and not ran_on
    if prompt.format == "json" and "{" in turn:
        answer = read_json_answer(turn, task, may_be_cut=may_be_cut or ends_openly)
        may_be_cut = False  # a whole object is not cut
    else:
        looks_cut = ends_openly and turn[-1] not in ".!?)\"'"
        answer = read_text_answer(turn, prompt, task, may_be_cut=may_be_cut or looks_cut)
    if answer.reason is not None:
        return sample(None, None, answer.reason)
    if may_be_cut and prompt.order == "label-first":
        return sample(None, None, "truncated")  # its rationale is cut
    rationale = answer.rationale
    if rationale_from == "reasoning":
        rationale = (reasoning or "").strip()
    label = task.read_label(answer.label, fields)
    if isinstance(label, Unreadable):
        return sample(None, rationale, _unreadable_reason(label, answer, prompt, may_be_cut))
    if task.not_in_input(label, fields):
        return sample(None, rationale, "not-in-input")
    if _gives_several(answer, label, prompt, task, fields):
        return sample(None, rationale, "several-answers")
    is_open = is_unknown_reason(finish_reason) and not ran_on
    if (may_be_cut or is_open) and _is_cut(answer, label, prompt, task):
        return sample(None, rationale, "truncated")
    return sample(label, rationale, None)  # a label without a rationale is used too


def _unreadable_reason(
    label: Unreadable, answer: Answer, prompt: Prompt, may_be_cut: bool
) -> Reason:
    if may_be_cut and label.reason in ("empty", "unparsed", "label-outside-set"):
        return "truncated"
    if label.reason == "truncated" and prompt.order == "label-first" and answer.rationale:
        return "label-outside-set"  # a rationale follows it
    return label.reason


def _gives_several(answer: Answer, label: str, prompt: Prompt, task: Task, fields: Fields) -> bool:
    """Whether the reply gives another label after the one that was read."""
    for text in answer.repeated:
        other = task.read_label(text, fields)
        if isinstance(other, str) and not task.correct(other, label):
            return True
    if prompt.format == "json" or task.label_set is None:
        return False
    rest = answer.rationale
    if prompt.order == "rationale-first":
        rest = answer.label.strip().partition("\n")[2].strip()
    return gives_another_label(rest, label, task.label_set)


def _is_cut(answer: Answer, label: str, prompt: Prompt, task: Task) -> bool:
    """Whether the answer of a reply that may be cut may have gone on."""
    if prompt.order == "label-first" and answer.rationale:
        return _DOUBTS.match(answer.rationale) is not None
    return _begins_another_label(label, answer.label, task) or _is_draft(answer.label, label)


def _begins_another_label(label: str, answer: str, task: Task) -> bool:
    """Whether a cut label may have been a longer one: "card" the beginning of "card fraud".

    Without a closed set, any text at the reply's end may have gone on, and so may several labels.
    """
    end = task.label_end(answer.strip())
    if end is not None:
        return not answer.strip()[end:].strip(MARKUP) and not answer.rstrip().endswith(("}", "]"))
    if task.labels is None:
        return "\n" not in answer.strip() and not answer.rstrip().endswith("}")
    return any(other != label and other.startswith(label) for other in task.labels)


def _is_draft(answer: str, label: str) -> bool:
    """Whether a cut reply continues after its answer like a thought.

    The thoughts of a model whose template writes the opening tag have no mark until they end.
    """
    line, _, rest = answer.strip().partition("\n")
    goes_on = len(line.split()) > len(label.split()) + _WORDS_AROUND_LABEL
    return goes_on or _DOUBTS.match(rest) is not None


def first_turn(text: str, stop: tuple[str, ...], anchors: tuple[str, ...] = ()) -> tuple[str, bool]:
    """The reply up to where the model begins an example of its own, and whether it began one.

    Models that complete text go on with invented examples, whose answers must not be read as this
    one's. The beginning of a stop string in the last line counts too: the token budget cut it. It
    does not right after an anchor, where "T" is an answer and not the beginning of "Text:".
    """
    if text.startswith("\n"):
        text = "\n" + text.lstrip("\n")  # the reply may begin with a stop that begins a line
    starts = [position for mark in stop if (position := text.find(mark)) >= 0]
    if starts:
        return text[: min(starts)].strip("\n").rstrip(), True
    text = text.lstrip("\n")
    for mark in stop:
        leading_space = len(mark) - len(mark.lstrip())
        for length in range(len(mark) - 1, leading_space, -1):
            before = text[:-length]
            if text.endswith(mark[:length]) and _ends_a_line(before, mark, anchors):
                return before.rstrip(), True
    return text.rstrip(), False


def _ends_a_line(before: str, mark: str, anchors: tuple[str, ...]) -> bool:
    """Whether a stop string can begin after a text."""
    begins_line = mark.startswith("\n") or not before or before.endswith("\n")
    return begins_line and not before.rstrip(MARKUP).lower().endswith(
        tuple(anchor.lower() for anchor in anchors)
    )


# --- flaws of a rationale

_MENTIONS_HINT = re.compile(
    r"\bhint(?:s|ed|ing)?\b"
    r"|\b(?:given|provided|supplied|stated|expected|known|gold|correct|right) (?:answer|label)\b"
    r"|\b(?:answer|label) (?:is|was|has been) (?:given|provided|stated|supplied|known|told)\b"
    r"|\b(?:as|we (?:are|were)|i (?:am|was)) (?:told|given|instructed|informed)\b"
    r"|\b(?:since|because|as|given that|knowing that) (?:the|its|your) (?:answer|label)"
    r" (?:is|must|should)\b"
    r"|\b(?:this|the|your) note\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+")
_COPIED_WORDS = 12  # a common run of this length is not a coincidence
_HINT_WORDS = 5


def read_sample(
    reply_text: str,
    prompt: Prompt,
    task: Task,
    fields: Fields,
    *,
    min_words: int,
    hint: str | None = None,
    finish_reason: str | None = None,
    reasoning: str | None = None,
    rationale_from: RationaleFrom = "visible",
) -> Sample:
    """Parse a reply and look for flaws in its rationale.

    ``hint`` is the text of the hint without the label, where the request had one.
    """
    sample = parse_reply(
        reply_text,
        prompt,
        task,
        fields,
        finish_reason,
        reasoning=reasoning,
        rationale_from=rationale_from,
    )
    if hint is not None:
        sample = sample.model_copy(update={"hinted": True})
    if sample.label is None:
        return sample
    flaw = _flaw(
        sample.rationale, sample.label, prompt, task, fields, min_words=min_words, hint=hint
    )
    if flaw is None:
        return sample
    return sample.model_copy(update={"reason": flaw})


def _flaw(
    rationale: str | None,
    label: str,
    prompt: Prompt,
    task: Task,
    fields: Fields,
    *,
    min_words: int,
    hint: str | None,
) -> Reason | None:
    if rationale is None:
        # a label without a rationale is used, unless the hint gave it away
        return None if hint is None else "empty"
    question = task.text(fields)
    if hint is not None and leaks_hint(rationale, hint, question):
        return "hint-leaked"
    if is_short(rationale, min_words):
        return "too-short"
    exemplars = [(exemplar.input, exemplar.rationale) for exemplar in prompt.exemplars]
    if copies_exemplar(rationale, question, exemplars):
        return "copies-exemplar"
    if contradicts(rationale, label, task, fields):
        return "contradicts-rationale"
    return None


def is_short(rationale: str, min_words: int) -> bool:
    """Whether the rationale has fewer words than ``min_words``.

    A script without spaces is measured by its characters, four to a word.
    """
    return len(rationale.split()) < min_words and len(rationale) < 4 * min_words


def copies_exemplar(rationale: str, question: str, exemplars: Sequence[tuple[Fields, str]]) -> bool:
    """Whether the rationale is an exemplar's, entirely or in a run of words that is most of it.

    An exemplar with the same input as the question may be repeated.
    """
    words = _words(rationale)
    question_text = " ".join(_words(question))
    for fields, exemplar_rationale in exemplars:
        exemplar_words = _words(exemplar_rationale)
        if len(exemplar_words) < 4 or not _share_run(words, exemplar_words):
            continue
        texts = [
            " ".join(_words(str(value))) for value in fields.values() if isinstance(value, str)
        ]
        if not texts or not all(text in question_text for text in texts):
            return True
    return False


def _share_run(words: list[str], exemplar_words: list[str]) -> bool:
    if words == exemplar_words:
        return True
    length = max(_COPIED_WORDS, round(0.8 * len(words)))
    if length > min(len(words), len(exemplar_words)):
        return False
    return not _runs(words, length).isdisjoint(_runs(exemplar_words, length))


def _runs(words: list[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def contradicts(rationale: str, label: str, task: Task, fields: Fields) -> bool:
    """Whether the rationale's last sentence concludes with another answer than ``label``."""
    conclusion = concluded_label(rationale, task, fields)
    return conclusion is not None and not task.correct(conclusion, label)


def leaks_hint(rationale: str, hint: str, question: str) -> bool:
    """Whether a rationale mentions the hint, or repeats five consecutive words of it.

    Words that the question has too ("hint", "the correct answer") are its subject.
    """
    question_text = " ".join(_words(question))
    for match in _MENTIONS_HINT.finditer(rationale):
        if " ".join(_words(match.group())) not in question_text:
            return True
    repeated = _runs(_words(rationale), _HINT_WORDS) & _runs(_words(hint), _HINT_WORDS)
    return any(" ".join(run) not in question_text for run in repeated)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


# --- the label's log-probability

_CONTEXT_CHARACTERS = 80  # before a label, by which it is found behind thoughts


def label_logprob(raw: str, text: str, prompt: Prompt, task: Task) -> float | None:
    """Sum of the log-probabilities, in nats, of the tokens of the label, or of its line.

    ``raw`` is the reply's JSON in one of the OpenAI API's two forms: chat
    (``logprobs.content[].token, .logprob``) or completions (``logprobs.tokens, .token_logprobs``).
    A token that straddles the anchor's end belongs to the label. None without log-probabilities.
    """
    tokens = _token_logprobs(raw)
    if tokens is None:
        return None
    visible, _ = split_thoughts(text, task.label_set)
    turn, _ = first_turn(visible, prompt.stop, prompt.anchor)
    if prompt.format == "json" and "{" in turn:
        answer = read_json_answer(turn, task, may_be_cut=False)
    else:
        answer = read_text_answer(turn, prompt, task)
    before = turn[: answer.label_span[0]]
    line = turn[slice(*answer.label_span)]
    if not line:
        return None
    # in bytes, because a token may hold part of a character
    all_bytes = b"".join(token for token, _ in tokens)
    line_start = _answer_position(all_bytes, text, visible, before, line)
    if line_start < 0:
        return None
    line_end = line_start + len(line.encode())
    total = 0.0
    has_tokens = False
    position = 0
    for token, logprob in tokens:
        overlaps = position < line_end and position + len(token) > line_start
        if overlaps and token.strip():
            total += logprob
            has_tokens = True
        position += len(token)
    if not has_tokens:
        return None
    return round(total, 6)


def _answer_position(tokens: bytes, text: str, visible: str, before: str, line: str) -> int:
    """Where the answer's line begins among the tokens; -1: nowhere. It follows any thoughts."""
    context = before
    if visible == text:
        start = tokens.find((context + line).encode(), max(0, tokens.find(text.encode())))
    else:
        context = before[-_CONTEXT_CHARACTERS:]
        start = tokens.rfind((context + line).encode())
    if start < 0:
        return -1
    return start + len(context.encode())


def _token_logprobs(raw: str) -> list[tuple[bytes, float]] | None:
    """Each token's bytes and log-probability; None without them."""
    try:
        logprobs = json.loads(raw)["choices"][0]["logprobs"]
        if "content" in logprobs:
            return [(_token_bytes(token), float(token["logprob"])) for token in logprobs["content"]]
        return [
            (str(token).encode(), float(logprob or 0.0))
            for token, logprob in zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
        ]
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def _token_bytes(token: dict[str, Any]) -> bytes:
    values = token.get("bytes")
    if values is not None:
        return bytes(values)
    return str(token["token"]).encode("utf-8", "replace")
