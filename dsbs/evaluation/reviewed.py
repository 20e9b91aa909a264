"""What people's reviews show: the changed labels, the teacher's true accuracy, and the agreement of
two reviewers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.evaluation.bootstrap import Clusters, counts_interval, mean_interval
from dsbs.evaluation.systems import System
from dsbs.formatting import confidence_interval, count, percent
from dsbs.prompting import source_fingerprint
from dsbs.records import Annotation
from dsbs.records.measures import Rate, wilson
from dsbs.records.reviews import (
    CorrectedAccuracy,
    Review,
    ReviewedSplit,
    Reviews,
    apply_reviews,
    current_reviews,
    deciding_reviews,
    proposal,
)
from dsbs.run_folder import RunFolder
from dsbs.tasks import Task
from dsbs.tasks.data import position

SAMPLE = 100  # random rows before the teacher's true accuracy is estimated


# --- the teacher's true accuracy


@dataclass(frozen=True, slots=True)
class Estimate:
    """The teacher's true accuracy on a split, estimated from reviewed random rows.

    The random rows are the longest beginning of ``random_sample`` in which every row is decided.
    Which other rows were reviewed, and why, has no influence.
    """

    rate: Rate | None
    """None: fewer than ``needed`` random rows are decided."""
    decided: int
    """Random rows with a decision, and those without a label of the teacher, which count as
    wrong."""
    needed: int
    skipped: int
    """Random rows that were only skipped. They do not count."""
    other: int
    """Other reviewed rows. They do not count."""
    of_split: bool = False
    """Whether the estimate is for the whole split, of which `dsbs annotate --next` has annotated a
    part. Otherwise it is for the annotated rows."""

    @property
    def missing(self) -> int:
        return max(0, self.needed - self.decided)

    @property
    def sentence(self) -> str:
        """The estimate, or how many rows it still needs; and which rows do not count."""
        if self.rate is None and not self.missing:
            text = "The teacher's true accuracy cannot be estimated: there are no random rows."
        elif self.rate is None:
            text = (
                f"{count(self.missing, 'more random row')} to review before the teacher's true "
                f"accuracy can be estimated ({self.decided} of {self.needed})."
            )
        else:
            rows = "all rows of the split" if self.of_split else "the annotated rows"
            text = (
                f"The teacher is right on {percent(self.rate.value)} of {rows} "
                f"({confidence_interval(self.rate.ci95)}), by {count(self.rate.n, 'random row')}."
            )
        if self.other:
            rows = count(self.other, "other reviewed row")
            text += (
                f" {rows[0].upper()}{rows[1:]} {'does' if self.other == 1 else 'do'} not count: "
                "only random rows show the accuracy on all."
            )
        if self.skipped:
            text += f" {count(self.skipped, 'skipped random row')} may be harder than most."
        return text


def random_order(ids: Iterable[str]) -> list[str]:
    """Ids in the order in which random rows are reviewed: by a hash."""
    return sorted(ids, key=lambda row_id: (position(row_id, "review"), row_id))


def has_chosen_rows(annotations: Iterable[Annotation]) -> bool:
    """Whether `dsbs annotate --next` chose some of the rows."""
    return any(annotation.chosen_by is not None for annotation in annotations)


def random_sample(annotations: Iterable[Annotation]) -> list[str]:
    """The ids of the rows that estimate the teacher's accuracy, in random order.

    All rows with a reply, or, where `dsbs annotate --next` chose rows, its random ones: the others
    are harder than most.
    """
    rows = [row for row in annotations if row.has_reply]
    if has_chosen_rows(rows):
        rows = [row for row in rows if row.chosen_by == "random"]
    return random_order(row.id for row in rows)


def estimate(
    annotations: Mapping[str, Annotation], reviews: Reviews, task: Task, needed: int = SAMPLE
) -> Estimate:
    """Estimate the teacher's accuracy with Wilson's interval, once ``needed`` random rows, or all
    of them, are decided.

    The teacher is right where its own label is the right one. A rejected row is judged by its gold
    label, and is wrong without one.
    """
    decided = deciding_reviews(reviews)
    sample = random_sample(annotations.values())
    needed = min(needed, len(sample))
    correct = number = skipped = used = 0
    are_all = True
    for row_id in sample:
        annotation = annotations[row_id]
        review = decided.get(row_id)
        if annotation.own_label is None:
            number += 1
            used += review is not None
        elif review is not None:
            number += 1
            used += 1
            correct += is_right(annotation, review, task)
        elif current_reviews(reviews.get(row_id, ())):
            skipped += 1
        else:
            are_all = False
            break
    reviewed = sum(row_id in annotations for row_id in decided)
    rate = wilson(correct, number) if number >= needed or are_all else None
    of_split = has_chosen_rows(annotations.values())
    return Estimate(rate, number, needed, skipped, reviewed - used, of_split)


def is_right(annotation: Annotation, review: Review, task: Task) -> bool:
    """Whether the teacher's own label is right according to a review."""
    truth = review.right_label
    if truth is None:
        truth = review.right_gold(annotation.gold)
    label = annotation.own_label
    return label is not None and truth is not None and task.correct(label, truth)


# --- what reviews changed


def reviewed_splits(
    recipe: Recipe, task: Task, run: RunFolder, systems: Sequence[System], clusters: Clusters
) -> dict[str, ReviewedSplit]:
    """What reviews changed, by split. ``systems`` are those of the evaluated split: their figures
    keep the data's gold labels, and accuracies by the corrected ones are added.
    """
    splits = {}
    for split in ("train", "valid", "test"):
        reviews = run.read_reviews(split)
        if not any(map(current_reviews, reviews.values())):
            continue
        try:
            annotations = run.load_annotations(split, source_fingerprint(recipe, task))
        except UserError:  # then no student was trained on them either
            annotations = {}
        changes = _changes(annotations, reviews, task)
        if split == recipe.eval.split and changes.gold_changed:
            corrected = _corrected_accuracies(systems, deciding_reviews(reviews), task, clusters)
            changes = changes.model_copy(update={"corrected": corrected})
        splits[split] = changes
    return splits


def _changes(annotations: Mapping[str, Annotation], reviews: Reviews, task: Task) -> ReviewedSplit:
    decided = deciding_reviews(reviews)
    overlaid = apply_reviews(annotations, reviews, task)
    labels_changed = rationales_changed = 0
    for row_id, review in decided.items():
        label = None
        if row_id in annotations:
            label, _ = proposal(annotations[row_id], task)
        right = review.right_label
        if right is not None:
            labels_changed += label is None or not task.correct(right, label)
        rationales_changed += review.rationale is not None
    before = list(annotations.values())
    after = list(overlaid.values())
    teacher_labels = [row.own_label for row in before]
    gold_after = [row.gold for row in after]
    return ReviewedSplit(
        rows=len(annotations),
        reviewed=len(decided),
        reviewers=len({name for of_row in reviews.values() for name in current_reviews(of_row)}),
        accepted=sum(review.decision == "accepted" for review in decided.values()),
        rejected=sum(review.decision == "rejected" for review in decided.values()),
        labels_changed=labels_changed,
        rationales_changed=rationales_changed,
        gold_changed=sum(review.gold_is_wrong for review in decided.values()),
        teacher_before=_share_right(teacher_labels, [row.gold for row in before], task),
        teacher_after=_share_right(teacher_labels, gold_after, task),
        labels_before=_accuracy_of_accepted(before, task),
        labels_after=_accuracy_of_accepted(after, task),
        true_accuracy=estimate(annotations, reviews, task).rate,
    )


def _share_right(
    labels: Sequence[str | None], gold: Sequence[str | None], task: Task
) -> Rate | None:
    """The share of right labels among the rows with gold; a missing label is wrong."""
    marks = [
        label is not None and task.correct(label, right)
        for label, right in zip(labels, gold, strict=True)
        if right is not None
    ]
    return wilson(sum(marks), len(marks))


def _accuracy_of_accepted(rows: Sequence[Annotation], task: Task) -> Rate | None:
    accepted = [row for row in rows if row.accepted]
    return _share_right([row.own_label for row in accepted], [row.gold for row in accepted], task)


def _corrected_accuracies(
    systems: Sequence[System], decided: Mapping[str, Review], task: Task, clusters: Clusters
) -> dict[str, CorrectedAccuracy]:
    rows = systems[0].files[0].rows
    gold = [
        decided[row.id].right_gold(row.label) if row.id in decided else row.label for row in rows
    ]
    has_gold = np.array([label is not None for label in gold])
    if not has_gold.any():
        return {}
    accuracies = {}
    for system in systems:
        marks = [
            [
                label is not None and right is not None and task.correct(label, right)
                for label, right in zip(file.labels, gold, strict=True)
            ]
            for file in system.files
        ]
        scores = np.mean(np.array(marks, dtype=np.float64), axis=0)[has_gold]
        of_rows = None if clusters is None else clusters[has_gold]
        accuracies[system.name] = CorrectedAccuracy(
            before=float(system.scores.mean()),
            value=float(scores.mean()),
            ci95=mean_interval(scores, of_rows),
            n=len(scores),
        )
    return accuracies


# --- two reviewers


@dataclass(frozen=True, slots=True)
class Agreement:
    """The agreement of two reviewers on the rows that both decided on."""

    reviewers: tuple[str, str]
    rows: int
    agreed: int
    kappa: float | None
    """Cohen's kappa (1960) over the right labels, with rejection as a category of its own; over the
    decisions if labels are free text or have parts. None: all answers are the same."""
    kappa_ci95: tuple[float, float] | None
    """Its 95% interval, by bootstrap over the rows."""
    differences: list[tuple[str, Review, Review]]
    """The ids of the rows on which they differ, with their decisions."""

    @property
    def sentence(self) -> str:
        first, second = self.reviewers
        kappa = ""
        if self.kappa is not None and self.kappa_ci95 is not None:
            low, high = self.kappa_ci95
            kappa = f", Cohen's kappa {self.kappa:.2f} (95% CI [{low:.2f}, {high:.2f}])"
        return (
            f"{first} and {second} agree on {self.agreed} of "
            f"{count(self.rows, 'row')} that both reviewed{kappa}."
        )


def agreement(
    reviews: Reviews, task: Task, reviewers: tuple[str, str] | None = None
) -> Agreement | None:
    """Compare two reviewers, by default the two with the most rows in common.

    None: no row was decided by two reviewers.
    """
    current = {
        row_id: {
            name: review
            for name, review in current_reviews(of_row).items()
            if review.decision != "skipped"
        }
        for row_id, of_row in reviews.items()
    }
    if reviewers is None:
        pairs = Counter(pair for of_row in current.values() for pair in combinations(of_row, 2))
        common = Counter[tuple[str, str]]()
        for (first, second), number in pairs.items():
            common[min(first, second), max(first, second)] += number
        if not common:
            return None
        reviewers = max(common, key=lambda pair: (common[pair], pair))
    both = {
        row_id: (of_row[reviewers[0]], of_row[reviewers[1]])
        for row_id, of_row in current.items()
        if of_row.keys() >= set(reviewers)
    }
    if not both:
        return None
    differences = [
        (row_id, first, second)
        for row_id, (first, second) in both.items()
        if not _same_answer(first, second, task)
    ]
    answers = [(_answer(first, task), _answer(second, task)) for first, second in both.values()]
    kappa, interval = _kappa(answers)
    agreed = len(both) - len(differences)
    return Agreement(reviewers, len(both), agreed, kappa, interval, differences)


def _kappa(
    answers: Sequence[tuple[str, str]],
) -> tuple[float | None, tuple[float, float] | None]:
    """Cohen's kappa and its 95% interval; None, None where all answers are the same."""
    pairs, pair_of_row = np.unique(answers, axis=0, return_inverse=True)
    names = np.unique(pairs)
    if len(names) == 1:
        return None, None
    # Unobserved kinds, for the interval where all rows are alike: a disagreement and an agreement.
    pairs = np.concatenate([pairs, [names[:2], names[[0, 0]]]])
    codes = np.searchsorted(names, pairs)
    first, second = np.moveaxis(np.eye(len(names))[codes], 1, 0)
    agree = (pairs[:, 0] == pairs[:, 1]).astype(float)

    def kappa(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """(resamples, pairs) -> (resamples,)."""
        rows = counts.sum(axis=1)
        expected = ((counts @ first) * (counts @ second)).sum(axis=1) / rows**2
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((counts @ agree / rows - expected) / (1 - expected))

    kinds = pair_of_row.reshape(-1)
    value = kappa(np.bincount(kinds, minlength=len(pairs)).astype(float)[None])[0]
    return float(value), counts_interval(kinds, kappa, num_kinds=len(pairs))


def _answer(review: Review, task: Task) -> str:
    """The category of a decision for kappa."""
    if task.is_free_text or task.is_equation or task.part_names:
        return review.decision
    return "-" if review.right_label is None else f"={review.right_label}"


def _same_answer(first: Review, second: Review, task: Task) -> bool:
    """Whether two decisions have the same right label, or are both rejections."""
    if first.right_label is None or second.right_label is None:
        return first.right_label is second.right_label
    return task.correct(first.right_label, second.right_label)
