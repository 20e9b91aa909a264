"""Summaries: the totals of an annotation run, and warnings about its rejected rows."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsbs.annotation.backends import RejectedError, total_usage
from dsbs.annotation.backends.faults import is_unknown_reason
from dsbs.annotation.store import ReplyStore
from dsbs.annotation.vote import Vote
from dsbs.config import Recipe, base_of
from dsbs.config.registry import METHODS, entry
from dsbs.errors import DsbsError, PartialError, UserError
from dsbs.files import digest, write_jsonl
from dsbs.formatting import count, dollars, listing, one_line, percent, sentence_list
from dsbs.progress import Progress
from dsbs.records import Annotation, Example, Reason, Sample, Usage
from dsbs.records.measures import Rate, wilson
from dsbs.run_folder import RunFolder
from dsbs.tasks import Task

NOTABLE_SHARE = 0.1  # a rejection reason with a larger share of the rows is reported
REFUSALS_IN_A_ROW = 16  # of one message; then it is found out whether all are refused
_SHOWN_DETAILS = 5  # messages about rows without a reply
_KEPT_DETAILS = 20
_SHOWN_CHARACTERS = 100  # of each end of an example reply

REASONS: dict[Reason, str] = {
    "unparsed": "there is no readable answer after the prompt's anchor",
    "empty": "there is no text, no rationale, or nothing after the prompt's anchor",
    "truncated": "annotate.max_tokens ended the reply before its answer",
    "spent-on-reasoning": "annotate.max_tokens was spent on hidden reasoning",
    "label-outside-set": "the answer is not one of the task's labels",
    "not-in-input": "a value that must occur in the input does not",
    "several-answers": "the reply gives several different answers",
    "refused": "the endpoint rejected the request, or the model declined",
    "contradicts-rationale": "the rationale concludes with another answer",
    "copies-exemplar": "the rationale copies one of the prompt's exemplars",
    "too-short": "the rationale has fewer words than annotate.min_rationale_words",
    "hint-leaked": "the rationale mentions the hint",
    "no-reply": "there is no reply",
    "rejected-in-review": "a person rejected it",
}

_ADVICE = {
    "refused": "not asked again; `--retry-refused` does, once the cause is settled",
    "no-reply": "the same command asks again",
    "unparsed": "if it has an answer in another form, set anchor or pattern in the prompt file; "
    "while the requests stay the same, the stored replies are read again",
}


@dataclass(slots=True)
class SplitSummary:
    """The figures of one split.

    ``requests`` counts attempts sent by this command, ``wasted`` those of them that brought no
    reply, by kind; ``cached`` counts replies that were stored before. ``hinted`` counts the
    outcomes of the rows that were requested again with a hint. ``usd`` is the cost of all replies
    in the rows, whenever they were bought (None: not known), and ``usd_of_hints`` the part for
    requests with a hint: the hinted ones' share of a row's replies. Rows with the same request
    share its replies, which count once; ``paid_rows`` are those whose replies count.
    ``first_rejected`` is the first rejected row per reason. ``chosen`` counts the rows that
    ``--next`` chose, ``random`` those of them in the random sample. ``details`` counts why rows
    have no reply, by reason and message; ``unknown_finish_reasons`` counts replies with a finish
    reason that no provider documents.
    """

    rows: int = 0
    accepted: int = 0
    without_rationale: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    correct: int = 0
    correct_accepted: int = 0
    with_gold: int = 0
    accepted_with_gold: int = 0
    chosen: int = 0
    random: int = 0
    random_correct: int = 0
    random_with_gold: int = 0
    hinted: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    wasted: Counter[str] = field(default_factory=Counter)
    cached: int = 0
    usage: Usage = field(default_factory=Usage)
    usd: float | None = 0.0
    usd_of_hints: float = 0.0
    paid_rows: int = 0
    wall_s: float = 0.0
    first_rejected: dict[Reason, Annotation] = field(default_factory=dict)
    details: Counter[tuple[Reason, str]] = field(default_factory=Counter)
    unknown_finish_reasons: Counter[str] = field(default_factory=Counter)
    _keys: set[int] = field(default_factory=set)
    _messages: dict[str, str] = field(default_factory=dict)  # the first one of each form

    def add(self, annotation: Annotation, task: Task) -> None:
        """Count one row."""
        self.rows += 1
        own_label = annotation.own_label
        gold = annotation.gold
        correct = gold is not None and own_label is not None and task.correct(own_label, gold)
        # A row without a reply says nothing about the teacher.
        is_scored = gold is not None and annotation.has_reply
        self.with_gold += is_scored
        self.correct += correct
        self.chosen += annotation.chosen_by is not None
        if annotation.chosen_by == "random":
            self.random += 1
            self.random_with_gold += is_scored
            self.random_correct += correct
        if annotation.samples and annotation.samples[-1].hinted:
            outcome: str = annotation.samples[-1].reason or "still another label"
            if annotation.provenance == "hinted":
                outcome = "accepted"
            self.hinted[outcome] += 1
        self._add_cost(annotation)
        for sample in annotation.samples:
            if is_unknown_reason(sample.finish_reason):
                self.unknown_finish_reasons[str(sample.finish_reason)] += 1
        if annotation.accepted:
            self.accepted += 1
            if annotation.provenance != "hinted":
                self.accepted_with_gold += gold is not None
                self.correct_accepted += correct
            self.without_rationale += annotation.rationale is None
        elif annotation.reject_reason is not None:
            self.rejected[annotation.reject_reason] += 1
            self.first_rejected.setdefault(annotation.reject_reason, annotation)
            if annotation.reject_detail is not None:
                form = message_form(annotation.reject_detail)
                message = self._messages.setdefault(form, annotation.reject_detail)
                self.details[annotation.reject_reason, message] += 1

    def _add_cost(self, annotation: Annotation) -> None:
        if annotation.request_key:
            key = annotation.request_key
            if annotation.samples and annotation.samples[-1].hinted:  # the hint is the gold label
                key = digest(key, annotation.gold or "")
            number = int(key[:15], 16)
            if number in self._keys:
                return
            self._keys.add(number)
        self.usage = total_usage([self.usage, annotation.usage])
        if self.usd is None or annotation.usd is None:
            self.usd = None
            return
        self.usd += annotation.usd
        self.paid_rows += annotation.usd > 0
        hinted = sum(sample.hinted for sample in annotation.samples)
        self.usd_of_hints += annotation.usd * hinted / max(1, len(annotation.samples))

    def add_requests(self, shard: SplitSummary) -> None:
        """Add what a shard requested: its rows are counted in the merged file.

        Shards run side by side, so the longest decides the time.
        """
        self.requests += shard.requests
        self.cached += shard.cached
        self.wasted += shard.wasted
        self.wall_s = max(self.wall_s, shard.wall_s)

    @property
    def label_accuracy(self) -> Rate | None:
        """Of the teacher's own labels, over all rows with gold and a reply; an unreadable label is
        wrong.
        """
        return wilson(self.correct, self.with_gold)

    @property
    def label_accuracy_accepted(self) -> Rate | None:
        """Over the accepted rows with gold that needed no hint."""
        return wilson(self.correct_accepted, self.accepted_with_gold)

    @property
    def label_accuracy_random(self) -> Rate | None:
        """Over the random sample of a split whose rows ``--next`` chose: an unbiased estimate of
        that over all rows.
        """
        return wilson(self.random_correct, self.random_with_gold)

    def warnings(self, split: str, methods: Sequence[str] = ()) -> list[str]:
        """Frequent reasons for rejected rows and missing rationales, each with what to do.

        ``methods`` are the recipe's methods that learn rationales (``rationale_methods``).
        """
        warnings = [
            f"{split}: {count(number, 'row')} {reason}: {message} ({_ADVICE[reason]})"
            for (reason, message), number in self.details.most_common(_SHOWN_DETAILS)
        ]
        explained = {reason for reason, _ in self.details}
        for reason, example in self.first_rejected.items():
            rejected = self.rejected[reason]
            if rejected <= NOTABLE_SHARE * self.rows or reason in explained:
                continue
            rows = count(self.rows, "row")
            warning = f"{split}: {rejected:,} of {rows} rejected ({reason}): {REASONS[reason]}"
            text = _first_text(example)
            if text is not None:
                warning += f". The reply to row {example.id}: {text}"
                if reason in _ADVICE:
                    warning += f" ({_ADVICE[reason]})"
            warnings.append(warning)
        if methods and self.without_rationale > NOTABLE_SHARE * self.accepted:
            warnings.append(
                f"{split}: {self.without_rationale:,} of {count(self.accepted, 'accepted row')} "
                "without a rationale: the reply has no text before the answer (with order: "
                f"label-first, none after it), so {sentence_list(methods)} cannot learn a "
                "rationale from them. Ask for reasons in the prompt; set annotate.order: "
                "label-first if the model answers first and explains afterwards; or use the "
                "reasoning of a reasoning model (annotate.rationale_from: reasoning)"
            )
        return warnings

    def as_json(self) -> dict[str, Any]:
        overall = self.label_accuracy
        accepted = self.label_accuracy_accepted
        figures: dict[str, Any] = {
            "rows": self.rows,
            "accepted": self.accepted,
            "without_rationale": self.without_rationale,
            "rejected": dict(sorted(self.rejected.items())),
            "label_accuracy": None if overall is None else round(overall.value, 4),
            "label_accuracy_ci95": rounded_interval(overall),
            "label_accuracy_accepted": None if accepted is None else round(accepted.value, 4),
            "hinted": dict(sorted(self.hinted.items())),
            "requests": self.requests,
            "wasted": dict(sorted(self.wasted.items())),
            "cached": self.cached,
            "reject_details": [
                {"reason": reason, "detail": message, "rows": number}
                for (reason, message), number in self.details.most_common(_KEPT_DETAILS)
            ],
            "unknown_finish_reasons": dict(sorted(self.unknown_finish_reasons.items())),
            "usage": self.usage.model_dump(),
            "usd": None if self.usd is None else round(self.usd, 6),
            "usd_of_hints": round(self.usd_of_hints, 6),
            "paid_rows": self.paid_rows,
            "wall_s": round(self.wall_s, 3),
        }
        if self.chosen:
            random = self.label_accuracy_random
            figures |= {
                "chosen": self.chosen,
                "random": self.random,
                "label_accuracy_random": None if random is None else round(random.value, 4),
                "label_accuracy_random_ci95": rounded_interval(random),
            }
        return figures


def rationale_methods(recipe: Recipe) -> list[str]:
    """The recipe's training methods that learn rationales."""
    return [name for name in recipe.train.methods if entry(METHODS, base_of(name)).needs_rationales]


def message_form(message: str) -> str:
    """A message without its numbers and ids: equal for errors of one cause."""
    return re.sub(r"[0-9a-f-]*\d[0-9a-f-]*", "0", message.lower())


def rounded_interval(rate: Rate | None) -> list[float] | None:
    """A rate's 95% confidence interval as it is written to JSON."""
    if rate is None:
        return None
    return [round(bound, 4) for bound in rate.ci95]


def _first_text(annotation: Annotation) -> str | None:
    """The first reply of a row, quoted, its middle cut; None: it has no reply with a text."""
    for sample in annotation.samples:
        text = one_line(sample.text)
        if len(text) > 2 * _SHOWN_CHARACTERS:  # the answer stands at the beginning or the end
            text = f"{text[:_SHOWN_CHARACTERS].rstrip()} … {text[-_SHOWN_CHARACTERS:].lstrip()}"
        if text:
            return f'"{text}"'
    return None


@dataclass(frozen=True, slots=True)
class AnnotateResult:
    """The closing summary of ``dsbs annotate``.

    ``reportable`` is False for a run on limited data. ``can_continue``: whether running again may
    bring missing replies. ``remaining``: train rows that ``--next`` has not chosen; None: it chose
    none, and all rows are annotated.
    """

    run: Path
    splits: dict[str, SplitSummary]
    reportable: bool
    can_continue: bool = True
    remaining: int | None = None

    def error(self) -> DsbsError | None:
        """The error that ends the command although every file was written; None: all is well."""
        missing = sum(summary.rejected["no-reply"] for summary in self.splits.values())
        if missing and self.can_continue:
            return PartialError(
                f"{count(missing, 'row')} got no reply",
                hint="run the same command again: it requests only the missing replies",
            )
        rejected: Counter[str] = Counter()
        for summary in self.splits.values():
            rejected += summary.rejected
        if not rejected or any(summary.accepted for summary in self.splits.values()):
            return None
        return DsbsError(
            f"no row was accepted ({listing(rejected)})",
            hint=f"read the replies in {RunFolder(self.run).stage('annotate')}, then change the "
            "prompt (annotate.prompt) or the settings named above; replies to unchanged requests "
            "are not requested again",
        )

    def as_json(self) -> dict[str, Any]:
        result: dict[str, Any] = {
            "run": str(self.run),
            "reportable": self.reportable,
            "splits": {name: summary.as_json() for name, summary in self.splits.items()},
        }
        return result if self.remaining is None else result | {"remaining": self.remaining}


def write_annotations(
    path: Path,
    annotations: Iterable[Annotation],
    task: Task,
    summary: SplitSummary,
    progress: Progress | None = None,
) -> None:
    """Write annotations to ``path`` and count them in ``summary``."""

    def lines() -> Iterator[str]:
        for annotation in annotations:
            summary.add(annotation, task)
            if progress is not None and summary.rows % 1024 == 0:
                progress.update(summary.rows)
            # keys are in the schema's order: equal rows are equal bytes
            yield annotation.model_dump_json(by_alias=True)

    write_jsonl(path, lines())


@dataclass(frozen=True, slots=True)
class RowsToRequest:
    """Rows whose replies are to be bought, their number, and the summary to count in."""

    title: str
    examples: Callable[[], Iterable[Example]]
    total: int
    summary: SplitSummary


class ProgressFigures:
    """Figures for the progress line."""

    def __init__(self, task: Task, vote: Callable[[Sequence[Sample]], Vote]) -> None:
        self._task = task
        self._vote = vote
        self.rows = 0
        self._counts: Counter[str] = Counter()

    def add(self, example: Example, samples: Sequence[Sample]) -> None:
        self.rows += 1
        vote = self._vote(samples)
        self._counts["accepted"] += vote.reason is None
        if example.label is not None:
            self._counts["gold"] += 1
            self._counts["correct"] += vote.label is not None and self._task.correct(
                vote.label, example.label
            )

    def note(self, usd: float) -> str:
        counts = self._counts
        note = f"accepted {percent(counts['accepted'] / self.rows)}"
        if counts["gold"]:
            note += f", label accuracy {percent(counts['correct'] / counts['gold'])}"
        if usd:
            note += f", {dollars(usd)}"
        return note


class Refusals:
    """Refused requests of a run.

    A refusal that the table of faults does not know may be the row's fault or everybody's. It is
    ``pending``, and stored once the endpoint has answered a request that was sent later.
    """

    def __init__(self, store: ReplyStore) -> None:
        self._store = store
        self.messages: dict[str, str] = {}  # by the request's key
        self.pending: dict[str, int] = {}  # the number of requests sent when it came
        self.last = ""
        self.number = 0  # without those of a content filter
        self.flagged = 0
        self.in_a_row = 0  # of one message, and pending
        self.limit = REFUSALS_IN_A_ROW
        self._form = ""
        self._stop: DsbsError | None = None

    def add(self, key: str, error: RejectedError, sent: int) -> None:
        self.last = str(error)
        self._stop = error.stop
        self.messages[key] = self.last
        if error.blame == "content":
            self.flagged += 1
        else:
            self.number += 1
        if error.blame in ("content", "row") or self._store.refusal([key]) is not None:
            self._store.refuse(key, self.last)
            return
        self.pending[key] = sent
        form = message_form(self.last)
        self.in_a_row = self.in_a_row + 1 if form == self._form else 1
        self._form = form

    def confirm(self, started: int) -> None:
        """The endpoint has answered the request with this number."""
        self.in_a_row = 0
        for key in [key for key, sent in self.pending.items() if sent < started]:
            self._store.refuse(key, self.messages[key])
            del self.pending[key]

    def confirm_all(self) -> None:
        self.confirm(sys.maxsize)

    def error(self, has_answered: bool) -> DsbsError:
        """The error for an endpoint that refuses every request; none is kept as refused."""
        for key in self.pending:
            self._store.fail(key, self.messages[key])
        if self._stop is not None and not has_answered:
            return self._stop
        if has_answered:
            return PartialError(
                "the teacher refuses one request after the other, for no fault of the rows: "
                f"{self.last}",
                hint="run the same command again when that is settled: these rows were not kept as "
                "refused",
            )
        return UserError(
            f"the teacher refuses every request: {self.last}",
            hint="check teacher.model and annotate.max_tokens; teacher.extra_body adds, changes or "
            "(null) drops fields",
        )
