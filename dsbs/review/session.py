"""Review session: the rows that the page shows, and the decisions that it saves."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.evaluation.reviewed import agreement, estimate
from dsbs.formatting import percent
from dsbs.records.reviews import (
    Decision,
    Review,
    current_reviews,
    read_reviews,
)
from dsbs.review.queue import FILTERS, Order, QueueItem, ReviewRow, ordered
from dsbs.run_folder import RunFolder, append_review
from dsbs.serving.settings import ApiError, Settings
from dsbs.tasks import Task

ORDERS: dict[Order, str] = {
    "mistakes": "likely mistakes first",
    "random": "random",
    "file": "as in the file",
}
_MAX_DIFFERENCES = 200  # in one answer
_CLOCK_SKEW = timedelta(minutes=1)


class LabelForm(BaseModel):
    """A label that a reviewer chose or typed, as JSON: a text, a list or an object."""

    model_config = ConfigDict(extra="forbid")

    id: str
    label: JsonValue = None
    gold_is_wrong: bool = False


class ReviewForm(LabelForm):
    """A decision. Row, reviewer and ``time`` together identify it."""

    decision: Decision
    rationale: str | None = Field(None, max_length=100_000)
    reviewer: str = Field(min_length=1, max_length=80)
    time: datetime
    order: Order | None = None
    """The order in which the row was shown. None: the reviewer searched for it, so it does not
    count as random."""

    @field_validator("reviewer")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        name = value.strip()
        if not name or not name.isprintable():
            raise ValueError("a reviewer needs a name without control characters")
        return name

    @field_validator("time")
    @classmethod
    def _in_utc(cls, value: datetime) -> datetime:
        if value.tzinfo is None:
            raise ValueError("the time has no zone")
        return min(value.astimezone(UTC), datetime.now(UTC) + _CLOCK_SKEW)


@dataclass
class ReviewSession:
    """The rows of a split and the decisions on them. Methods block and are thread-safe."""

    run: RunFolder
    recipe: Recipe
    task: Task
    split: str
    rows: Sequence[ReviewRow]
    reviewer: str
    order: Order = "mistakes"
    settings: Settings = field(default_factory=Settings)
    is_stopping: bool = False

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._at = {row.id: n for n, row in enumerate(self.rows)}
        self._reviews: dict[str, list[Review]] = {}
        self._version: tuple[int, int] | None = None
        self._orders: dict[Order, list[int]] = {}
        self._items: dict[Order, dict[int, QueueItem]] = {}
        self.refresh()
        self.queue_order(self.order)  # slow work happens before the page opens

    # --- the decisions on disk

    def refresh(self) -> None:
        """Read the decisions again if another process has added some."""
        version = self._file_version()
        if version != self._version:
            self._reviews = read_reviews(self.run.reviews(self.split))
            self._version = version

    def _file_version(self) -> tuple[int, int] | None:
        try:
            status = self.run.reviews(self.split).stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_size

    def _current(self, n: int) -> dict[str, Review]:
        return current_reviews(self._reviews.get(self.rows[n].id, ()))

    # --- rows

    def queue_order(self, order: Order) -> list[int]:
        """The numbers of all rows in an order; computed once, as some take seconds."""
        with self._lock:
            if order not in self._orders:
                items = ordered(self.rows, self.task, order=order)
                numbers = [self._at[item.row.id] for item in items]
                self._orders[order] = numbers
                self._items[order] = dict(zip(numbers, items, strict=True))
            return self._orders[order]

    def queue(self, query: Mapping[str, str]) -> dict[str, Any]:
        """The numbers of the rows that pass a page's filters, in the requested order."""
        order = next((name for name in ORDERS if name == query.get("order", self.order)), None)
        if order is None or query.get("reason", "") not in ("", *FILTERS):
            raise ApiError(400, "unknown order or reason", "no_such_choice")
        with self._lock:
            self.refresh()
            numbers = self.queue_order(order)
            chosen = [n for n in numbers if self._fits(n, query)]
            return {
                "rows": chosen,
                "last": self._last_of(query.get("reviewer", "")),
                "progress": self.progress(),
            }

    def _fits(self, n: int, query: Mapping[str, str]) -> bool:
        """Whether a row passes all filters. Cheap ones are checked first."""
        row = self.rows[n]
        chosen = [query.get("reason"), query.get("gold") and "gold-differs"]
        chosen.append(query.get("student") and "student-differs")
        if not all(FILTERS[name][1](row, self.task) for name in chosen if name):
            return False
        if query.get("label") and not self._has_label(row, query["label"]):
            return False
        if not self._fits_state(n, query):
            return False
        words = query.get("q", "").lower().split()
        if not words:
            return True
        texts = (row.text, row.label or "", row.rationale or "", row.gold or "", row.id)
        text = "\n".join(texts).lower()
        return all(word in text for word in words)

    def _fits_state(self, n: int, query: Mapping[str, str]) -> bool:
        current = self._current(n)
        me = query.get("reviewer", "")
        if query.get("by"):
            if query["by"] not in current:
                return False
            current = {query["by"]: current[query["by"]]} | (
                {me: current[me]} if me in current else {}
            )
        match query.get("state", "all"):
            case "open":
                return me not in current
            case "done":
                return me in current
            case "gold-wrong":
                return any(review.gold_is_wrong for review in current.values())
            case "disputed":
                return self._is_disputed(n)
            case "all":
                return True
            case decision:
                return any(review.decision == decision for review in current.values())

    def _is_disputed(self, n: int) -> bool:
        labels = [
            review.right_label
            for review in self._current(n).values()
            if review.decision != "skipped"
        ]
        first = labels[0] if labels else None
        return any(
            label is not first
            and (label is None or first is None or not self.task.correct(label, first))
            for label in labels
        )

    def _has_label(self, row: ReviewRow, text: str) -> bool:
        if row.label is None:
            return False
        low = text.strip().lower()
        if low in (label.lower() for label in self.task.head_labels):
            return low in (label.lower() for label in self.task.classes(row.label))
        return low in row.label.lower()

    def _why(self, n: int) -> list[str]:
        """The reasons to review a row, as sentences."""
        orders = dict.fromkeys([self.order, *self._items])
        item = next(self._items[order][n] for order in orders if order in self._items)
        is_random = any(self._items[order][n].sampled for order in self._items)
        return [*item.reasons, *(["a random row, for the estimate"] if is_random else [])]

    def reasons(self) -> list[tuple[str, str]]:
        """(name, phrase) of each reason that applies to at least one row."""
        return [
            (name, words)
            for name, (words, fits) in FILTERS.items()
            if any(fits(row, self.task) for row in self.rows)
        ]

    def _same(self, row: ReviewRow, label: str) -> bool:
        return row.label is not None and self.task.correct(label, row.label)

    # --- responses to the page

    def shown_rows(self, numbers: Sequence[int], reviewer: str) -> dict[str, Any]:
        with self._lock:
            self.refresh()
            return {"rows": [self._shown_row(n, reviewer) for n in numbers]}

    def _shown_row(self, n: int, reviewer: str) -> dict[str, Any]:
        row = self.rows[n]
        current = self._current(n)
        mine = current.get(reviewer)
        # Other decisions are shown only after the reviewer's own, which they would influence.
        shown = [review for name, review in current.items() if mine and name != reviewer]
        students = []
        if row.student is not None:
            label = None if row.student_label is None else self._shown_label(row, row.student_label)
            probability = row.student_probability
            students = [{"name": row.student, "label": label, "probability": probability}]
        return {
            "n": n,
            "id": row.id,
            "fields": [[name, _field_text(value)] for name, value in row.input.items()],
            "label": None if row.label is None else self._shown_label(row, row.label),
            "rationale": row.rationale,
            "vote": self._vote(row),
            "gold": None if row.gold is None else self._shown_label(row, row.gold),
            "students": students,
            "choices": row.input.get("choices") if self.task.has_choices else None,
            "why": self._why(n),
            "mine": None if mine is None else self._shown_review(row, mine),
            "others": [self._shown_review(row, review) for review in shown],
        }

    def _shown_label(self, row: ReviewRow, label: str) -> dict[str, Any]:
        """A label, with its differences from the teacher's."""
        value = self.task.value(label)
        shown = {"text": label, "value": value, "same": self._same(row, label)}
        if isinstance(value, dict) and row.label is not None:
            correct = self.task.correct_parts(label, row.label)
            shown["differs"] = [name for name, is_same in correct.items() if not is_same]
        return shown

    def _shown_review(self, row: ReviewRow, review: Review) -> dict[str, Any]:
        label = None if review.label is None else self._shown_label(row, review.label)
        return {
            "decision": review.decision,
            "label": label,
            "rationale": review.rationale,
            "gold_is_wrong": review.gold_is_wrong,
            "reviewer": review.reviewer,
        }

    def _vote(self, row: ReviewRow) -> list[str]:
        """Sentences about the vote, and about why an annotation is not used."""
        samples = row.annotation.samples
        lines = []
        if len(samples) > 1 and row.vote_share is not None:
            other_labels = {
                sample.label: None
                for sample in samples
                if sample.label is not None and not self._same(row, sample.label)
            }
            also = ", ".join(map(_one_line, other_labels))
            line = f"{percent(row.vote_share)} of {len(samples)} replies"
            lines.append(f"{line}; others: {also}" if also else line)
        reason = row.annotation.reject_reason
        if not row.is_accepted and reason is not None:
            lines.append(f"not used for training so far: {reason}")
        return lines

    def progress(self) -> dict[str, Any]:
        """The numbers of rows, of reviewed rows, and of each reviewer's. Skipped rows count as
        reviewed.
        """
        by: dict[str, int] = {}
        reviewed = 0
        for row_id, reviews in self._reviews.items():
            if row_id in self._at:
                names = list(current_reviews(reviews))
                reviewed += bool(names)
                for name in names:
                    by[name] = by.get(name, 0) + 1
        return {"rows": len(self.rows), "reviewed": reviewed, "by": by}

    def _last_of(self, reviewer: str) -> int | None:
        """The number of the row that a reviewer decided on last."""
        current = (current_reviews(of_row).get(reviewer) for of_row in self._reviews.values())
        mine = [review for review in current if review is not None and review.id in self._at]
        return self._at[max(mine, key=lambda review: review.when).id] if mine else None

    def summary(self) -> dict[str, Any]:
        """The teacher's estimated accuracy and the reviewers' agreement."""
        with self._lock:
            self.refresh()
            annotations = {row.id: row.annotation for row in self.rows}
            sentences = [estimate(annotations, self._reviews, self.task).sentence]
            differences = []
            agreed = agreement(self._reviews, self.task)
            if agreed is not None:
                sentences.append(agreed.sentence)
                differences = [
                    {"n": self._at[row_id], "id": row_id, "texts": [*map(_opinion, pair)]}
                    for row_id, *pair in agreed.differences[:_MAX_DIFFERENCES]
                    if row_id in self._at
                ]
            return {
                "progress": self.progress(),
                "sentences": sentences,
                "differences": differences,
            }

    # --- decisions

    def check_label(self, form: LabelForm) -> dict[str, Any]:
        """A label in canonical form, with whether it is the teacher's; or the problem with it."""
        row = self._row(form.id)
        try:
            label = self._read_label(row, form.label)
            self._check_gold(row, form, label)
        except ApiError as error:
            return {"problem": error.message}
        return self._shown_label(row, label)

    def save(self, form: ReviewForm) -> dict[str, Any]:
        """Save a decision on disk, and return the updated row.

        A decision that is already saved is not saved again: a killed server may not have
        acknowledged it. Raises ApiError (422), and DsbsError if it cannot be written.
        """
        row = self._row(form.id)
        n = self._at[row.id]
        time = form.time.isoformat(timespec="milliseconds")
        with self._lock:
            self.refresh()
            is_known = any(
                (review.reviewer, review.time) == (form.reviewer, time)
                for review in self._reviews.get(row.id, ())
            )
            if not is_known:
                self._append(self._review(row, form, time))
            return {"row": self._shown_row(n, form.reviewer), "progress": self.progress()}

    def _append(self, review: Review) -> None:
        version = self._version
        append_review(self.run, self.split, review)
        now = self._file_version()
        line = len(review.model_dump_json(by_alias=True).encode()) + 1
        if now is not None and now[1] == (version[1] if version else 0) + line:
            self._reviews.setdefault(review.id, []).append(review)  # nobody else wrote
            self._version = now

    def _row(self, row_id: str) -> ReviewRow:
        if row_id not in self._at:
            raise ApiError(422, "no such row", "no_row")
        return self.rows[self._at[row_id]]

    def _read_label(self, row: ReviewRow, value: JsonValue) -> str:
        """A label of the task in canonical form. Raises ApiError (422)."""
        if isinstance(value, str) and not value.strip():
            raise ApiError(422, "the label is empty", "no_label")
        try:
            return self.task.gold(value, row.input, f"row {row.id}")
        except UserError as error:
            raise ApiError(422, error.problem, "no_label") from None
        except (TypeError, ValueError, AttributeError, KeyError):  # another shape of JSON
            raise ApiError(422, "not a label of this task", "no_label") from None

    def _check_gold(self, row: ReviewRow, form: LabelForm, label: str | None) -> None:
        if not form.gold_is_wrong:
            return
        if row.gold is None:
            raise ApiError(422, "the row has no gold label", "no_gold")
        if label is not None and self.task.correct(label, row.gold):
            raise ApiError(422, "this is the gold label, which you marked as wrong", "same_as_gold")

    def _review(self, row: ReviewRow, form: ReviewForm, time: str) -> Review:
        """The decision as a line of the file, which has only what the reviewer changed."""
        decision = form.decision
        label = rationale = None
        if decision == "corrected":
            if form.label is not None:
                label = self._read_label(row, form.label)
                if self._same(row, label):
                    label = None
            if form.rationale is not None and form.rationale.strip() != (row.rationale or ""):
                rationale = form.rationale.strip()
            if label is None and rationale is None:
                decision = "accepted"
        if decision in ("accepted", "corrected") and label is None and row.label is None:
            raise ApiError(422, "the teacher gave no label: choose one, or reject", "no_label")
        self._check_gold(row, form, None if decision == "rejected" else label or row.label)
        return Review(
            id=row.id,
            decision=decision,
            label=label,
            shown=None if decision == "undone" else row.label,
            rationale=rationale,
            gold_is_wrong=form.gold_is_wrong,
            reviewer=form.reviewer,
            time=time,
            sampled=self._is_sampled(self._at[row.id], form.order),
        )

    def _is_sampled(self, n: int, order: Order | None) -> bool:
        items = {} if order is None else self._items.get(order, {})
        return n in items and items[n].sampled


def _field_text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return str(value)


def _opinion(review: Review) -> str:
    label = review.right_label
    return f"{review.reviewer}: {review.decision if label is None else _one_line(label)}"


def _one_line(label: str) -> str:
    return label.replace("\n", ", ")
