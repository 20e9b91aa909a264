"""Reviews: people's decisions on annotations, in ``review/<split>.jsonl``.

An overlay: annotations and data are never changed. Every decision is a line, and so is undoing one.
Each reviewer's latest decision on a row counts; of several reviewers', the latest in time.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from filelock import FileLock, Timeout
from pydantic import Field, ValidationError, field_validator, model_validator

from dsbs.errors import DsbsError, PartialError, UserError
from dsbs.files import DISK_FULL, canonical_json, digest, last_line_start, make_folder
from dsbs.records import Annotation, Example, Sample, Unreadable, _Record
from dsbs.records.measures import Interval, Rate, ResultRecord

Decision = Literal["accepted", "corrected", "rejected", "skipped", "undone"]
Reviews = Mapping[str, Sequence["Review"]]
"""The decisions on each row by its id, in the order of the file."""
_LOCK_WAIT_S = 30.0


class Review(_Record):
    """One decision of a reviewer on a row.

    ``accepted``: label and rationale are right. ``corrected``: label or rationale is replaced.
    ``rejected``: the annotation is not used. ``skipped``: no opinion. ``undone``: revokes the
    reviewer's previous decision.
    """

    schema_: Literal["dsbs.review/1"] = Field("dsbs.review/1", alias="schema")
    id: str
    decision: Decision
    label: str | None = None
    """The right label in canonical form, if it differs from the annotation's."""
    shown: str | None = None
    """The annotation's label at the time of the decision. If the row is annotated again and gets
    another label, an accepted one is still right, and a rejection no longer applies."""
    rationale: str | None = None
    """The edited rationale. Empty: it is wrong and nothing replaces it. None: unchanged."""
    gold_is_wrong: bool = False
    gold: str | None = None
    """The right gold label, if gold is wrong. None: the accepted or new label; for a rejected
    annotation, unknown."""
    comment: str | None = None
    reviewer: str = Field(min_length=1)
    time: str
    """UTC, ISO 8601."""
    sampled: bool = False
    """Whether the row was shown as a random row."""

    @field_validator("time")
    @classmethod
    def _has_zone(cls, value: str) -> str:
        if datetime.fromisoformat(value).tzinfo is None:
            raise ValueError("the time has no zone, e.g. +00:00")
        return value

    @model_validator(mode="after")
    def _fits_decision(self) -> Review:
        if self.gold is not None and not self.gold_is_wrong:
            raise ValueError("gold is given, and gold_is_wrong is false")
        if self.gold_is_wrong and self.decision in ("skipped", "undone"):
            raise ValueError(f"gold_is_wrong is not for {self.decision} rows")
        if self.decision == "corrected":
            if self.label is None and self.rationale is None:
                raise ValueError("a correction needs a label or a rationale")
        elif self.label is not None or self.rationale is not None:
            raise ValueError(f"label and rationale are for corrections, not for {self.decision}")
        if self.decision in ("accepted", "corrected") and self.right_label is None:
            raise ValueError("shown is missing: the label that was decided on")
        return self

    @property
    def right_label(self) -> str | None:
        """The row's label according to the reviewer; None: unknown."""
        if self.decision not in ("accepted", "corrected"):
            return None
        return self.label if self.label is not None else self.shown

    def right_gold(self, gold: str | None) -> str | None:
        """The row's gold label after the review, where it was ``gold``; None: unknown."""
        if not self.gold_is_wrong:
            return gold
        return self.gold if self.gold is not None else self.right_label

    @property
    def when(self) -> datetime:
        return datetime.fromisoformat(self.time)


class ReviewedSplit(ResultRecord):
    """What people's reviews of a split changed. Rates have Wilson's 95% intervals."""

    rows: int
    """Annotated rows."""
    reviewed: int
    """Rows with a decision."""
    reviewers: int
    accepted: int
    rejected: int
    labels_changed: int
    rationales_changed: int
    gold_changed: int
    teacher_before: Rate | None = None
    """The teacher's own labels against the data's gold labels. None: there are none."""
    teacher_after: Rate | None = None
    """The same against the gold labels as people corrected them."""
    labels_before: Rate | None = None
    """The labels of accepted annotations against the data's gold labels."""
    labels_after: Rate | None = None
    """The labels that training uses, people's corrections among them, against the corrected gold
    labels."""
    true_accuracy: Rate | None = None
    """The teacher's, by the random rows alone. None: too few of them were reviewed."""
    corrected: dict[str, CorrectedAccuracy] = {}
    """Of the evaluated split, where people corrected gold labels: the systems' accuracies, by
    name."""


class CorrectedAccuracy(ResultRecord):
    """A system's accuracy by the data's gold labels, and by those that people corrected."""

    before: float
    value: float
    """By the corrected ones."""
    ci95: Interval
    n: int
    """Rows with a gold label after the corrections."""


class _Labels(Protocol):
    """The part of a task that reviews need."""

    @property
    def head_labels(self) -> tuple[str, ...]: ...
    def correct(self, predicted: str, gold: str) -> bool: ...
    def read_label(self, text: str, fields: Mapping[str, Any]) -> str | Unreadable: ...


# --- the file


def read_reviews(path: Path) -> dict[str, list[Review]]:
    """Every decision by the row's id, in the order of the file; empty where there is no file.

    A half-written last line is left out: nobody was told that it is saved. Raises UserError with
    the line's number for any other line that is no review.
    """
    try:
        with path.open("rb") as file:
            end = _complete_length(file)
            file.seek(0)
            lines = file.read(end).split(b"\n")
    except FileNotFoundError:
        return {}
    reviews: dict[str, list[Review]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            review = Review.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "line"
            raise UserError(
                f"{path}:{number}: not a review ({field}: {first['msg']})",
                hint="fix or remove the line; the other decisions are kept",
            ) from None
        reviews.setdefault(review.id, []).append(review)
    return reviews


def write_reviews(path: Path, reviews: Sequence[Review]) -> None:
    """Append decisions, and return once they are on the disk.

    Safe for several threads and processes at once, and if killed at any moment; a half-written
    last line is cut off first. Raises PartialError for a full disk, and DsbsError where another
    process keeps the file.
    """
    data = "".join(review.model_dump_json(by_alias=True) + "\n" for review in reviews).encode()
    make_folder(path.parent)
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=_LOCK_WAIT_S):
            _append(path, data)
    except Timeout:
        raise DsbsError(
            f"{path} is in use by another process", hint="wait for it to end, then try again"
        ) from None
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise PartialError(
            f"cannot write {path} ({error.strerror})", hint="free some space, then try again"
        ) from None


def _append(path: Path, data: bytes) -> None:
    is_new = not path.exists()
    with path.open("ab+", buffering=0) as file:
        end = _complete_length(file)
        file.truncate(end)
        if end and not _ends_line(file, end):  # as an editor may leave it
            data = b"\n" + data
        try:
            written = file.write(data)
            if written != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(end)  # not acknowledged, so it must not count
            raise
    if is_new and hasattr(os, "O_DIRECTORY"):  # the folder's entry must last as well
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _complete_length(file: IO[bytes]) -> int:
    """The length of the file without a last line that a killed process left half-written."""
    end = file.seek(0, os.SEEK_END)
    if end == 0 or _ends_line(file, end):
        return end
    start = last_line_start(file, end)
    file.seek(start)
    with suppress(ValueError, RecursionError):
        if isinstance(json.loads(file.read(end - start)), dict):
            return end
    return start


def _ends_line(file: IO[bytes], end: int) -> bool:
    file.seek(end - 1)
    return file.read(1) == b"\n"


# --- which decisions count


def current_reviews(reviews: Iterable[Review]) -> dict[str, Review]:
    """Each reviewer's latest decision on a row that is not undone, including skipped ones."""
    decisions: dict[str, list[Review]] = {}
    for review in reviews:
        earlier = decisions.setdefault(review.reviewer, [])
        if review.decision != "undone":
            earlier.append(review)
        elif earlier:
            earlier.pop()
    return {name: stack[-1] for name, stack in decisions.items() if stack}


def deciding_review(reviews: Iterable[Review]) -> Review | None:
    """The decision on a row that counts: the latest of the reviewers' current ones. None: there is
    none, or all of them are skips.
    """
    current = [
        review for review in current_reviews(reviews).values() if review.decision != "skipped"
    ]
    return max(reversed(current), key=lambda review: review.when, default=None)


def deciding_reviews(reviews: Reviews) -> dict[str, Review]:
    """The decision that counts on each row that has one."""
    decided = ((row_id, deciding_review(of_row)) for row_id, of_row in reviews.items())
    return {row_id: review for row_id, review in decided if review is not None}


def reviews_mark(*splits: Reviews) -> str | None:
    """Hash of the decisions that count, for the record of a student. None: there are none."""
    decided = [deciding_reviews(reviews) for reviews in splits]
    if not any(decided):
        return None
    unmarked = {"time", "comment", "reviewer", "sampled"}
    texts = [
        [review.model_dump_json(exclude=unmarked) for _, review in sorted(reviews.items())]
        for reviews in decided
    ]
    return digest(canonical_json(texts))


# --- the overlay


def proposal(annotation: Annotation, task: _Labels) -> tuple[str | None, str | None]:
    """The label and rationale that a reviewer decides on. For a rejected annotation: the teacher's
    own answer, and the rationale of a reply with that answer. None: there is none.
    """
    if annotation.label is not None:
        return annotation.label, annotation.rationale
    label = annotation.own_label
    return label, annotation.rationale or _rationale_of(annotation.samples, label, task)


def apply_reviews(
    annotations: Mapping[str, Annotation], reviews: Reviews, task: _Labels
) -> dict[str, Annotation]:
    """The annotations after the review, by id; those without a decision are the same objects.

    A rejected annotation is no longer accepted. An accepted or corrected one has provenance
    ``reviewed``, and its label also replaces the teacher's own. The rationale of another label is
    dropped; a new one, or that of a reply with the right label, replaces it. Raises UserError for a
    label outside the task's closed set.
    """
    decided = deciding_reviews(reviews)
    return {
        row_id: _reviewed(annotation, decided[row_id], task) if row_id in decided else annotation
        for row_id, annotation in annotations.items()
    }


def apply_gold(rows: Iterable[Example], reviews: Reviews, task: _Labels) -> list[Example]:
    """The rows with the gold labels that people corrected.

    For rows of train and valid. Test rows keep their gold labels. Raises UserError as
    ``apply_reviews`` does.
    """
    decided = deciding_reviews(reviews)

    def corrected(row: Example) -> Example:
        review = decided.get(row.id)
        if review is None or not review.gold_is_wrong:
            return row
        label = review.right_gold(row.label)
        if label is not None:
            label = _as_the_task_writes(label, row.input, review, task)
        return replace(row, label=label)

    return [corrected(row) for row in rows]


def _as_the_task_writes(
    label: str, fields: Mapping[str, Any], review: Review, task: _Labels
) -> str:
    """A reviewer's label as the recipe spells it now. Raises UserError outside a closed set."""
    if not task.head_labels:
        return label
    canonical = task.read_label(label, fields)
    if isinstance(canonical, Unreadable):
        raise UserError(
            f"{review.reviewer}'s review of row {review.id!r} has label {label!r}, which is not "
            "one of the task's labels",
            hint="add it to task.labels, or review the row again",
        )
    return canonical


def _reviewed(annotation: Annotation, review: Review, task: _Labels) -> Annotation:
    gold = review.right_gold(annotation.gold)
    label = review.right_label
    proposed, rationale = proposal(annotation, task)
    if label is None:
        changes: dict[str, object] = {"gold": gold}
        if proposed is None or review.shown is None or task.correct(proposed, review.shown):
            changes |= {"accepted": False, "reject_reason": "rejected-in-review"}
        return annotation.model_copy(update=changes)
    label = _as_the_task_writes(label, annotation.input, review, task)
    samples = annotation.samples
    own_label = annotation.own_label
    if review.label is not None or own_label is None or not task.correct(own_label, label):
        own_label = label
    if annotation.own_label is None or not task.correct(annotation.own_label, label):
        # The teacher's votes for other labels are not taught; its reasons for this one are.
        right = (s for s in samples if s.label is not None and task.correct(s.label, label))
        update = {"hinted": False, "label_logprob": None}
        samples = [sample.model_copy(update=update) for sample in right]
    if proposed is None or not task.correct(proposed, label):
        accepted = [sample for sample in samples if sample.reason is None]
        rationale = _rationale_of(accepted, label, task)
    if review.rationale is not None:
        samples = [
            sample.model_copy(update={"rationale": None})
            if sample.rationale == rationale
            else sample
            for sample in samples
        ]
        rationale = review.rationale or None
    return annotation.model_copy(
        update={
            "gold": gold,
            "label": label,
            "own_label": own_label,
            "rationale": rationale,
            "provenance": "reviewed",
            "samples": samples or [Sample(text=label, label=label, rationale=rationale)],
            "accepted": True,
            "reject_reason": None,
            "reject_detail": None,
        }
    )


def _rationale_of(samples: Iterable[Sample], label: str | None, task: _Labels) -> str | None:
    """The rationale of the first reply with a label."""
    if label is None:
        return None
    for sample in samples:
        if sample.rationale and sample.label is not None and task.correct(sample.label, label):
            return sample.rationale
    return None
