"""Votes: one answer from several samples of a row (self-consistency, Wang et al., 2023).

Where labels consist of parts, each part is voted on by itself; scores are voted on by their median
or mean.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from dsbs.config import ScoreVote
from dsbs.records import Reason, Sample
from dsbs.tasks import Task


@dataclass(frozen=True, slots=True)
class Vote:
    """The winning label, a rationale that led to it, and the label's share of the readable samples.

    ``label`` is set even where ``reason`` rejects the row: a flawed rationale makes the label no
    less the teacher's answer. ``logprob`` is the mean over the winning samples that have one, in
    nats. ``run`` is the ensemble's member that gave the rationale. ``part_shares`` are the shares
    of the winning parts, of which ``share`` is the smallest; None where labels have no parts.
    """

    label: str | None
    rationale: str | None
    share: float | None
    logprob: float | None
    reason: Reason | None
    run: str | None = None
    part_shares: dict[str, float] | None = None


def majority(samples: Sequence[Sample], task: Task, scores: ScoreVote = "median") -> Vote:
    """The label with the most samples; in a tie, the label that was sampled first.

    Labels that the task treats as equal are counted together. The rationale is the first without a
    flaw that led to the winner; where all are flawed, the first one's reason rejects the row.
    Parts and ``scores`` are voted on by `_composed`.
    """
    groups = _groups(samples, task)
    if not groups:
        return Vote(None, None, None, None, samples[0].reason if samples else "no-reply")
    if task.part_names or task.has_order:
        return _composed(samples, task, scores)
    winner = max(groups, key=len)
    rationale, run, reason = _rationale(winner)
    logprobs = [sample.label_logprob for sample in winner if sample.label_logprob is not None]
    return Vote(
        label=winner[0].label,
        rationale=rationale,
        share=len(winner) / sum(len(group) for group in groups),
        logprob=sum(logprobs) / len(logprobs) if logprobs else None,
        reason=reason,
        run=run,
    )


def weighted_majority(samples: Sequence[Sample], task: Task, scores: ScoreVote = "median") -> Vote:
    """As ``majority``, for an ensemble's samples and their weights.

    Of groups with equal weight the one with the greater mean log-probability wins where all have
    one, else the one that an earlier member named. The rationale is that of the heaviest member
    that led to the winner without a flaw.
    """
    groups = _groups(samples, task)
    if not groups:
        reasons = (sample.reason for sample in samples if sample.reason not in (None, "no-reply"))
        return Vote(None, None, None, None, next(reasons, "no-reply"))
    if task.part_names or task.has_order:
        return _composed(samples, task, scores)
    weights = [math.fsum(sample.vote for sample in group) for group in groups]
    heaviest = max(weights)
    tied = [
        group
        for group, weight in zip(groups, weights, strict=True)
        if math.isclose(weight, heaviest)
    ]
    winner = _surest(tied)
    by_weight = sorted(winner, key=lambda sample: -_member_weight(sample, samples))
    rationale, run, reason = _rationale(by_weight)
    return Vote(
        label=winner[0].label,
        rationale=rationale,
        share=math.fsum(sample.vote for sample in winner) / math.fsum(weights),
        logprob=_mean_logprob(winner),
        reason=reason,
        run=run,
    )


# --- parts and scores


def _composed(samples: Sequence[Sample], task: Task, scores: ScoreVote) -> Vote:
    """The label of the winning parts, or the median or mean score; some sample is readable.

    The rationale is that of a sample that agrees most with the result: of the heaviest member, else
    of the first, without a flaw. Where all of those are flawed, the first one's reason rejects the
    row.
    """
    readable = [sample for sample in samples if sample.label is not None]
    total = math.fsum(sample.vote for sample in readable)
    part_shares = None
    if task.part_names:
        label, part_shares = _part_votes(readable, task)
        distance = [float(_wrong_parts(sample, label, task)) for sample in readable]
    else:
        label = _middle_score(readable, task, scores)
        result = _number(label, task)
        distance = [abs(_number(str(sample.label), task) - result) for sample in readable]
    winning = [s for s, d in zip(readable, distance, strict=True) if d == 0]
    closest = [s for s, d in zip(readable, distance, strict=True) if d == min(distance)]
    closest.sort(key=lambda sample: -_member_weight(sample, samples))
    rationale, run, reason = _rationale(closest)
    share = math.fsum(sample.vote for sample in winning) / total
    return Vote(
        label=label,
        rationale=rationale,
        share=share if part_shares is None else min(part_shares.values()),
        logprob=_mean_logprob(winning),
        reason=reason,
        run=run,
        part_shares=part_shares,
    )


def _part_votes(readable: Sequence[Sample], task: Task) -> tuple[str, dict[str, float]]:
    """The label of each part's most frequent value, and that value's share of the votes.

    In a tie, the value that was sampled first.
    """
    total = math.fsum(sample.vote for sample in readable)
    winners: dict[str, str | None] = {}
    shares = {}
    for name, votes in _part_ballots(readable, task).items():
        weights = [math.fsum(weight for _, weight in group) for group in votes]
        heaviest = max(weights)
        first = next(i for i, weight in enumerate(weights) if math.isclose(weight, heaviest))
        winners[name] = votes[first][0][0]
        shares[name] = weights[first] / total
    return task.label_of_parts(winners), shares


def _part_ballots(
    readable: Sequence[Sample], task: Task
) -> dict[str, list[list[tuple[str | None, float]]]]:
    """By part: the values and weights of the samples, grouped by value in the order of their
    first occurrence.
    """
    ballots: dict[str, dict[Hashable, list[tuple[str | None, float]]]] = {
        name: {} for name in task.part_names
    }
    for sample in readable:
        for name, value in task.parts(str(sample.label)).items():
            key = task.part_key(name, value)
            ballots[name].setdefault(key, []).append((value, sample.vote))
    return {name: list(groups.values()) for name, groups in ballots.items()}


def _wrong_parts(sample: Sample, label: str, task: Task) -> int:
    return sum(not is_right for is_right in task.correct_parts(str(sample.label), label).values())


def _number(label: str, task: Task) -> float:
    number = task.number(label)
    assert number is not None  # the task's labels have an order
    return number


def _middle_score(readable: Sequence[Sample], task: Task, scores: ScoreVote) -> str:
    """The weighted median, or the point nearest to the weighted mean.

    Of two medians, the one that was sampled first; of two nearest points, the one nearer to the
    first sample.
    """
    numbers = [_number(str(sample.label), task) for sample in readable]
    votes = [sample.vote for sample in readable]
    half = math.fsum(votes) / 2
    if scores == "mean":
        weighted = (vote * number for vote, number in zip(votes, numbers, strict=True))
        mean = math.fsum(weighted) / (2 * half)

        def distances(label: str) -> tuple[float, float]:
            number = _number(label, task)
            return round(abs(number - mean), 9), abs(number - numbers[0])

        return min(task.labels or (), key=distances)
    below = [math.fsum(v for v, x in zip(votes, numbers, strict=True) if x < y) for y in numbers]
    above = [math.fsum(v for v, x in zip(votes, numbers, strict=True) if x > y) for y in numbers]
    return next(
        str(sample.label)
        for sample, *sides in zip(readable, below, above, strict=True)
        if max(sides) <= half * (1 + 1e-9)
    )


# --- shared by all votes


def _rationale(samples: Sequence[Sample]) -> tuple[str | None, str | None, Reason | None]:
    """The first rationale without a flaw and the ensemble's member that gave it.

    And the first sample's reason, which rejects the row, where all samples are flawed.
    """
    sound = [sample for sample in samples if sample.reason is None]
    if not sound:
        return None, None, samples[0].reason
    for sample in sound:
        if sample.rationale:
            return sample.rationale, sample.run, None
    return None, None, None


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


def samples_needed(
    samples: Sequence[Sample], total: int, task: Task, scores: ScoreVote = "median"
) -> int:
    """The fewest further samples after which the vote of ``total`` may be settled; 0: it is.

    So many can be requested at once without requesting one too many. A median is settled by more
    than half of the samples; a mean takes all of them.
    """
    left = max(0, total - len(samples))
    readable = [sample for sample in samples if sample.label is not None]
    if task.part_names:
        ballots = _part_ballots(readable, task).values()
        sizes_of_parts = {tuple(len(group) for group in groups) for groups in ballots}
        return max(_fewest_further(sizes, left) for sizes in sizes_of_parts)
    sizes = [len(group) for group in _groups(samples, task)]
    if not task.has_order:
        return _fewest_further(sizes, left)
    if scores == "mean":
        return left
    return min(left, max(0, (len(readable) + left) // 2 + 1 - max(sizes, default=0)))


def _fewest_further(sizes: Sequence[int], left: int) -> int:
    """The fewest of ``left`` further votes after which the largest group may be settled.

    ``sizes`` are in the order in which the groups first occur.
    """
    for more in range(left):
        futures = [[*sizes, more]]
        for i, size in enumerate(sizes):
            futures.append([*sizes[:i], size + more, *sizes[i + 1 :]])
        if any(_is_settled(future, left - more) for future in futures):
            return more
    return left


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
