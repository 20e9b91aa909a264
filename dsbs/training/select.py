"""Which annotations are learned from. A view at training time: everything stays annotated, so filters cost no call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from dsbs.config import SelectSection
from dsbs.records.rows import Annotation
from dsbs.tasks.base import Task
from dsbs.tasks.load import position


def select(
    annotations: Iterable[Annotation], section: SelectSection, task: Task
) -> dict[str, Annotation]:
    """The accepted annotations that pass, by id. Rows left out still teach their own gold label.

    ``max_per_label`` keeps the first so many of each label in the order of a hash of the ids: the same rows in every run,
    and those of a smaller number among those of a larger one.
    """
    passed = [row for row in annotations if row.accepted and _passes(row, section, task)]
    if section.max_per_label is not None:
        passed.sort(key=lambda row: position(row.id, "select"))
        seen: Counter[str] = Counter()
        kept = []
        for row in passed:
            label = row.label or ""
            seen[label] += 1
            if seen[label] <= section.max_per_label:
                kept.append(row)
        passed = kept
    return {row.id: row for row in passed}


def _passes(row: Annotation, section: SelectSection, task: Task) -> bool:
    if section.agree_gold and not (
        row.gold is not None and row.label is not None and task.correct(row.label, row.gold)
    ):
        return False
    if section.min_vote is not None and (
        row.vote_share is None or row.vote_share < section.min_vote
    ):
        return False
    if section.min_logprob is not None and (
        row.label_logprob is None or row.label_logprob < section.min_logprob
    ):
        return False
    return section.provenance is None or row.provenance in section.provenance
