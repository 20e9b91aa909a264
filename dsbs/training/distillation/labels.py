"""Soft label targets: the student's distribution over the task's labels against a teacher's votes or probabilities.

Source: Hinton et al. 2015, arXiv:1503.02531, with a task's labels as the classes; a teacher behind an API shows no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsbs.records.rows import Annotation, Sample
from dsbs.tasks.base import Task
from dsbs.training.distillation import precise

if TYPE_CHECKING:
    from torch import Tensor


def label_distribution(scores: Tensor, target: Tensor, *, temperature: float) -> Tensor:
    """scores (B, L), target (B, L) probabilities -> scalar: T² · Σ_b KL(p_b ‖ softmax(scores_b / T)) in nats.

    ``scores`` are the log-probabilities that the student gives each label's text. p is the target softened alike:
    target^(1/T), normalised; what is 0 stays 0. A row of zeros has no target and counts nothing.
    """
    from torch.nn.functional import kl_div

    target = precise(target).detach()
    known = target.sum(dim=-1) > 0
    p = (target[known].log() / temperature).softmax(dim=-1)
    q = (precise(scores)[known] / temperature).log_softmax(dim=-1)
    return temperature**2 * kl_div(q, p, reduction="sum")


def vote_distribution(
    annotation: Annotation, labels: Sequence[str], task: Task
) -> list[float] | None:
    """A teacher's distribution over ``labels``, or None where it gave no readable one of them without a hint.

    Of several samples: each label's share of those that are readable and own. Of a single one: its label's probability, where
    the endpoint told it, and the rest evenly on the others; without it, 1 on that label. Of an ensemble: the mean of its
    members' distributions, each read so, by their weights.
    """
    members: dict[str | None, list[tuple[int, Sample]]] = {}
    for sample in annotation.samples:
        if not sample.hinted and (at := _place(sample.label, labels, task)) is not None:
            members.setdefault(sample.run, []).append((at, sample))
    if not members:
        return None
    if len(members) == 1:
        return _of_one(next(iter(members.values())), len(labels))
    weights = [math.fsum(sample.vote for _, sample in votes) for votes in members.values()]
    weighted = [
        [w * p for p in _of_one(votes, len(labels))]
        for w, votes in zip(weights, members.values(), strict=True)
    ]
    return [math.fsum(column) / math.fsum(weights) for column in zip(*weighted, strict=True)]


def _of_one(votes: Sequence[tuple[int, Sample]], labels: int) -> list[float]:
    """One annotator's distribution over so many labels, from its readable samples and where their labels stand."""
    if len(votes) > 1 or labels == 1:
        total = math.fsum(sample.vote for _, sample in votes)
        return [
            math.fsum(sample.vote for where, sample in votes if where == at) / total
            for at in range(labels)
        ]
    [(chosen, sample)] = votes
    sure = 1.0 if sample.label_logprob is None else min(1.0, math.exp(sample.label_logprob))
    return [sure if at == chosen else (1 - sure) / (labels - 1) for at in range(labels)]


def _place(label: str | None, labels: Sequence[str], task: Task) -> int | None:
    """Where a label stands among ``labels``: the first that the task holds to be the same."""
    return next(
        (at for at, one in enumerate(labels) if label is not None and task.correct(label, one)),
        None,
    )
