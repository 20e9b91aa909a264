"""Votes: one answer from several samples of a row (self-consistency, Wang et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dsbs.records import Reason, Sample
from dsbs.tasks import Task


@dataclass(frozen=True, slots=True)
class Vote:
    """The winning label, a rationale that led to it, and the label's share of the readable samples.

    ``label`` is set even where ``reason`` rejects the row: a flawed rationale makes the label no
    less the teacher's answer. ``logprob`` is the mean over the winning samples that have one, in
    nats. ``run`` is the ensemble's member that gave the rationale.
    """

    label: str | None
    rationale: str | None
    share: float | None
    logprob: float | None
    reason: Reason | None
    run: str | None = None


def majority(samples: Sequence[Sample], task: Task) -> Vote:
    """The label with the most samples; in a tie, the label that was sampled first.

    Labels that the task treats as equal are counted together. The rationale is the first without a
    flaw that led to the winner; where all are flawed, the first one's reason rejects the row.
    """
    groups = _groups(samples, task)
    if not groups:
        return Vote(None, None, None, None, samples[0].reason if samples else "no-reply")
    winner = max(groups, key=len)
    sound = [sample for sample in winner if sample.reason is None]
    logprobs = [sample.label_logprob for sample in winner if sample.label_logprob is not None]
    return Vote(
        label=winner[0].label,
        rationale=next((sample.rationale for sample in sound if sample.rationale), None),
        share=len(winner) / sum(len(group) for group in groups),
        logprob=sum(logprobs) / len(logprobs) if logprobs else None,
        reason=None if sound else winner[0].reason,
    )


def weighted_majority(samples: Sequence[Sample], task: Task) -> Vote:
    """As ``majority``, for an ensemble's samples and their weights.

    Of groups with equal weight the one with the greater mean log-probability wins where all have
    one, else the one that an earlier member named. The rationale is that of the heaviest member
    that led to the winner without a flaw.
    """
    groups = _groups(samples, task)
    if not groups:
        reasons = (sample.reason for sample in samples if sample.reason not in (None, "no-reply"))
        return Vote(None, None, None, None, next(reasons, "no-reply"))
    weights = [math.fsum(sample.vote for sample in group) for group in groups]
    heaviest = max(weights)
    tied = [
        group
        for group, weight in zip(groups, weights, strict=True)
        if math.isclose(weight, heaviest)
    ]
    winner = _surest(tied)
    by_weight = sorted(winner, key=lambda sample: -_member_weight(sample, samples))
    sound = [sample for sample in by_weight if sample.reason is None]
    explained = next((sample for sample in sound if sample.rationale), None)
    return Vote(
        label=winner[0].label,
        rationale=None if explained is None else explained.rationale,
        share=math.fsum(sample.vote for sample in winner) / math.fsum(weights),
        logprob=_mean_logprob(winner),
        reason=None if sound else by_weight[0].reason,
        run=None if explained is None else explained.run,
    )


def _surest(groups: list[list[Sample]]) -> list[Sample]:
    """The group with the greatest mean log-probability, where all have one; else the first."""
    logprobs = []
    for group in groups:
        logprob = _mean_logprob(group)
        if logprob is None:
            return groups[0]
        logprobs.append(logprob)
    return groups[logprobs.index(max(logprobs))]


def _mean_logprob(samples: Sequence[Sample]) -> float | None:
    """Weighted mean over the samples that have a log-probability, in nats."""
    terms = [
        (sample.vote, sample.label_logprob)
        for sample in samples
        if sample.label_logprob is not None
    ]
    if not terms:
        return None
    weighted = math.fsum(vote * logprob for vote, logprob in terms)
    return weighted / math.fsum(vote for vote, _ in terms)


def _member_weight(of: Sample, samples: Sequence[Sample]) -> float:
    """The weight of a sample's member, rounded: a third of it taken three times is not exact."""
    weight = math.fsum(
        sample.vote for sample in samples if sample.run == of.run and sample.label is not None
    )
    return float(f"{weight:.9g}")


def samples_needed(samples: Sequence[Sample], total: int, task: Task) -> int:
    """The fewest further samples after which the majority of ``total`` may be settled; 0: it is.

    So many can be requested at once without requesting one too many.
    """
    left = total - len(samples)
    sizes = [len(group) for group in _groups(samples, task)]
    for more in range(left):
        futures = [[*sizes, more]]
        for i, size in enumerate(sizes):
            futures.append([*sizes[:i], size + more, *sizes[i + 1 :]])
        if any(_is_settled(future, left - more) for future in futures):
            return more
    return max(0, left)


def _is_settled(sizes: Sequence[int], left: int) -> bool:
    """Whether ``left`` more votes cannot change the winner.

    ``sizes`` are in the order in which their labels first occur.
    """
    largest = max(sizes, default=0)
    # a new group could win only by passing the largest one: in a tie the earlier one wins
    if largest == 0 or left > largest:
        return False
    winner = sizes.index(largest)
    return all(size + left < largest + (i > winner) for i, size in enumerate(sizes) if i != winner)


def _groups(samples: Sequence[Sample], task: Task) -> list[list[Sample]]:
    """Readable samples grouped by label, in the order in which they first occur."""
    groups: list[list[Sample]] = []
    for sample in samples:
        if sample.label is None:
            continue
        for group in groups:
            label = group[0].label
            if label is not None and (label == sample.label or task.correct(sample.label, label)):
                group.append(sample)
                break
        else:
            groups.append([sample])
    return groups
