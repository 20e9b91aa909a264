"""Several samples of one row into one answer (self-consistency, Wang et al., 2023): the majority label wins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dsbs.records.rows import Reason, Sample
from dsbs.tasks.base import Task


@dataclass(frozen=True, slots=True)
class Vote:
    """The winning label with a rationale that led to it, and its share of the readable samples; or why it is not used.

    ``label`` stands even where ``reason`` does: a flawed rationale makes the label no less the teacher's answer.
    """

    label: str | None
    rationale: str | None
    share: float | None
    logprob: float | None  # mean over the winning samples that have one, in nats
    reason: Reason | None
    run: str | None = None  # the member of an ensemble whose rationale it is


def majority(samples: Sequence[Sample], task: Task) -> Vote:
    """Labels that the task holds to be the same vote together; of equal groups the one named first wins.

    The rationale is the first without a flaw that led to the winner; where all are flawed, the first one's rejects the row.
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
    """As ``majority``, of an ensemble's samples by their weights.

    Of groups that weigh the same the one with the greater mean log-probability wins, where it is known of all of them, else
    the one that an earlier member named. The rationale is the heaviest member's of those that led to the winner without a flaw.
    """
    groups = _groups(samples, task)
    if not groups:
        telling = (sample.reason for sample in samples if sample.reason not in (None, "no-reply"))
        return Vote(None, None, None, None, next(telling, "no-reply"))
    weights = [math.fsum(sample.vote for sample in group) for group in groups]
    level = [
        group
        for group, weight in zip(groups, weights, strict=True)
        if math.isclose(weight, max(weights))
    ]
    known = [logprob for group in level if (logprob := _mean_logprob(group)) is not None]
    winner = level[known.index(max(known))] if len(known) == len(level) else level[0]
    heavy = sorted(winner, key=lambda sample: -_member_weight(sample, samples))
    sound = [sample for sample in heavy if sample.reason is None]
    explained = next((sample for sample in sound if sample.rationale), None)
    return Vote(
        label=winner[0].label,
        rationale=None if explained is None else explained.rationale,
        share=math.fsum(sample.vote for sample in winner) / math.fsum(weights),
        logprob=_mean_logprob(winner),
        reason=None if sound else heavy[0].reason,
        run=None if explained is None else explained.run,
    )


def _mean_logprob(samples: Sequence[Sample]) -> float | None:
    """By the samples' weights, over those that have one, in nats."""
    known = [
        (sample.vote, sample.label_logprob)
        for sample in samples
        if sample.label_logprob is not None
    ]
    return (
        math.fsum(vote * logprob for vote, logprob in known) / math.fsum(vote for vote, _ in known)
        if known
        else None
    )


def _member_weight(of: Sample, samples: Sequence[Sample]) -> float:
    """Of the member that a sample is from; rounded, since thirds do not add up to the whole."""
    return float(
        f"{math.fsum(one.vote for one in samples if one.run == of.run and one.label is not None):.9g}"
    )


def still_needed(samples: Sequence[Sample], k: int, task: Task) -> int:
    """How many more of ``k`` samples must be seen before the majority label can be beyond change; 0: it is.

    So many can be asked at once without asking for one too many.
    """
    left = k - len(samples)
    sizes = [len(group) for group in _groups(samples, task)]
    for more in range(left):
        futures = [[*sizes[:i], sizes[i] + more, *sizes[i + 1 :]] for i in range(len(sizes))] + [
            [*sizes, more]
        ]
        if any(_is_settled(future, left - more) for future in futures):
            return more
    return max(0, left)


def _is_settled(sizes: Sequence[int], left: int) -> bool:
    """Whether ``left`` more votes cannot make another group win than the one that wins now (sizes in the order of naming)."""
    most = max(sizes, default=0)
    if (
        most == 0 or left > most
    ):  # a group yet unnamed could win; drawing level it would not, being named later
        return False
    winner = sizes.index(most)
    return all(size + left < most + (i > winner) for i, size in enumerate(sizes) if i != winner)


def _groups(samples: Sequence[Sample], task: Task) -> list[list[Sample]]:
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
    return groups
