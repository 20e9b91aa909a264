"""Several samples of one row into one answer (self-consistency, Wang et al., 2023): the majority label wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsbs.records import Reason, Sample
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


def still_needed(samples: Sequence[Sample], k: int, task: Task) -> int:
    """How many more of ``k`` samples must be seen before the majority label can be beyond change; 0: it is.

    So many can be asked at once without asking for one too many.
    """
    left = k - len(samples)
    sizes = [len(group) for group in _groups(samples, task)]
    for more in range(left):
        futures = [[*sizes[:i], sizes[i] + more, *sizes[i + 1 :]] for i in range(len(sizes))] + [[*sizes, more]]
        if any(_is_settled(future, left - more) for future in futures):
            return more
    return max(0, left)


def _is_settled(sizes: Sequence[int], left: int) -> bool:
    """Whether ``left`` more votes cannot make another group win than the one that wins now (sizes in the order of naming)."""
    most = max(sizes, default=0)
    if most == 0 or left > most:  # a group yet unnamed could win; drawing level it would not, being named later
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
