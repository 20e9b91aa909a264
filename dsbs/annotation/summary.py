"""The closing figures of a split."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsbs.records.results import Rate, wilson
from dsbs.records.rows import Annotation
from dsbs.tasks.base import Task


@dataclass(slots=True)
class SplitSummary:
    """What happened to one split.

    ``requests`` counts attempts sent now, ``wasted`` those of them that brought nothing, by kind; ``cached`` replies that were
    already bought. ``hinted`` counts what became of the rows that were asked again with a hint.
    """

    rows: int = 0
    accepted: int = 0
    without_rationale: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    correct: int = 0
    correct_accepted: int = 0
    with_gold: int = 0
    accepted_with_gold: int = 0
    hinted: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    wasted: Counter[str] = field(default_factory=Counter)
    cached: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    usd: float | None = (
        0.0  # of all replies in the rows, whenever bought; None: the price is not known
    )
    wall_s: float = 0.0

    def add(self, annotation: Annotation, task: Task) -> None:
        """Count one row."""
        self.rows += 1
        own, gold = annotation.own_label, annotation.gold
        right = gold is not None and own is not None and task.correct(own, gold)
        self.with_gold += annotation.gold is not None
        self.correct += right
        if annotation.samples and annotation.samples[-1].hinted:
            outcome = annotation.samples[-1].reason or "still another label"
            self.hinted["accepted" if annotation.provenance == "hinted" else outcome] += 1
        self.prompt_tokens += annotation.usage.prompt_tokens or 0
        self.cached_tokens += annotation.usage.cached_tokens or 0
        self.completion_tokens += annotation.usage.completion_tokens or 0
        self.usd = None if self.usd is None or annotation.usd is None else self.usd + annotation.usd
        if annotation.accepted:
            self.accepted += 1
            if annotation.provenance != "hinted":
                self.accepted_with_gold += annotation.gold is not None
                self.correct_accepted += right
            self.without_rationale += annotation.rationale is None
        else:
            self.rejected[str(annotation.reject_reason)] += 1

    @property
    def label_accuracy(self) -> Rate | None:
        """Of the teacher's own labels, over all rows with gold; a row without a readable label counts as wrong."""
        return wilson(self.correct, self.with_gold)

    @property
    def label_accuracy_accepted(self) -> Rate | None:
        """Over the accepted rows with gold that needed no hint."""
        return wilson(self.correct_accepted, self.accepted_with_gold)

    def as_json(self) -> dict[str, Any]:
        overall, accepted = self.label_accuracy, self.label_accuracy_accepted
        return {
            "rows": self.rows,
            "accepted": self.accepted,
            "without_rationale": self.without_rationale,
            "rejected": dict(sorted(self.rejected.items())),
            "label_accuracy": None if overall is None else round(overall.value, 4),
            "label_accuracy_ci95": None if overall is None else [round(x, 4) for x in overall.ci95],
            "label_accuracy_accepted": None if accepted is None else round(accepted.value, 4),
            "hinted": dict(sorted(self.hinted.items())),
            "requests": self.requests,
            "wasted": dict(sorted(self.wasted.items())),
            "cached": self.cached,
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "completion_tokens": self.completion_tokens,
            },
            "usd": None if self.usd is None else round(self.usd, 6),
            "wall_s": round(self.wall_s, 3),
        }


@dataclass(frozen=True, slots=True)
class AnnotateResult:
    """The closing summary of ``dsbs annotate``."""

    run: Path
    splits: dict[str, SplitSummary]
    reportable: bool  # False for a limited run
    can_go_on: bool = True  # whether running again may bring replies that are missing

    def as_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run),
            "reportable": self.reportable,
            "splits": {name: summary.as_json() for name, summary in self.splits.items()},
        }
