"""Several samples of one row into one answer (self-consistency, Wang et al., 2023): the majority label wins."""

from __future__ import annotations

from dataclasses import dataclass

from dsbs.records import Reason, Sample
from dsbs.tasks.base import Task


@dataclass(frozen=True, slots=True)
class Vote:
    """The winning label with a rationale that led to it, and its share of the readable samples; or why there is none."""

    label: str | None
    rationale: str | None
    share: float | None
    reason: Reason | None


def majority(samples: list[Sample], task: Task) -> Vote:
    """Labels that the task holds to be the same vote together; of equal groups the one named first wins."""
    groups: list[list[Sample]] = []
    for sample in samples:
        if sample.label is None:
            continue
        for group in groups:
            first = group[0].label
            if first is not None and (first == sample.label or task.correct(sample.label, first)):
                group.append(sample)
                break
        else:
            groups.append([sample])
    if not groups:
        return Vote(None, None, None, samples[0].reason if samples else "no-reply")
    winner = max(groups, key=len)
    rationale = next((sample.rationale for sample in winner if sample.rationale), None)
    return Vote(winner[0].label, rationale, len(winner) / sum(len(group) for group in groups), None)
