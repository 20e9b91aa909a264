"""What people's reviews show: what they changed, the teacher's true accuracy, how far two reviewers
agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

from dsbs.formatting import confidence_interval, count, percent
from dsbs.records import Annotation
from dsbs.records.results import Rate, wilson
from dsbs.records.reviews import Review, Reviews, current_reviews, deciding_reviews
from dsbs.tasks import Task
from dsbs.tasks.data import position

SAMPLE = 100  # random rows before the teacher's true accuracy is estimated


# --- the teacher's true accuracy


@dataclass(frozen=True, slots=True)
class Estimate:
    """The teacher's true accuracy on the rows of a split, from the random ones among the reviewed.

    The random rows are the first ones of a fixed random order of all rows, as far as all of them
    are decided. Which other rows were reviewed, and why, has no influence.
    """

    rate: Rate | None
    """None: fewer than ``needed`` random rows are decided."""
    decided: int
    """Random rows that are decided, or have no label of the teacher, which is wrong."""
    needed: int
    skipped: int
    """Random rows that nobody decided on, and somebody skipped: they do not count."""
    other: int
    """Other reviewed rows: they do not count."""

    @property
    def missing(self) -> int:
        return max(0, self.needed - self.decided)

    @property
    def sentence(self) -> str:
        """The estimate, or how many rows are missing for one; and which rows count."""
        if self.rate is None:
            text = (
                f"{count(self.missing, 'more random row')} to review before the teacher's true "
                f"accuracy can be estimated ({self.decided} of {self.needed})."
            )
        else:
            text = (
                f"The teacher is right on {percent(self.rate.value)} of the rows "
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
    """The ids of a split's rows in the order in which random ones are reviewed: by a hash."""
    return sorted(ids, key=lambda row_id: (position(row_id, "review"), row_id))


def estimate(
    annotations: Mapping[str, Annotation], reviews: Reviews, task: Task, needed: int = SAMPLE
) -> Estimate:
    """Estimate the teacher's accuracy with Wilson's interval, once ``needed`` random rows are
    decided, or all rows.

    The teacher is right where its own label is the right one. A rejected row is judged by its gold
    label, and is wrong without one.
    """
    decided = deciding_reviews(reviews)
    needed = min(needed, len(annotations))
    correct = number = skipped = used = 0
    are_all = True
    for row_id in random_order(annotations):
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
    return Estimate(rate, number, needed, skipped, reviewed - used)


def is_right(annotation: Annotation, review: Review, task: Task) -> bool:
    """Whether the teacher's own label is right according to a review."""
    truth = review.right_label
    if truth is None:
        truth = review.right_gold(annotation.gold)
    label = annotation.own_label
    return label is not None and truth is not None and task.correct(label, truth)


# --- two reviewers


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two reviewers agree on the rows that both decided on."""

    reviewers: tuple[str, str]
    rows: int
    agreed: int
    kappa: float | None
    """Cohen's (1960), over the right labels, or over the decisions where labels are free text.
    A rejected row is an answer of its own. None: both gave one answer to all rows."""
    differences: list[tuple[str, Review, Review]]
    """The ids of the rows on which they differ, with their decisions."""

    @property
    def sentence(self) -> str:
        first, second = self.reviewers
        kappa = "" if self.kappa is None else f", Cohen's kappa {self.kappa:.2f}"
        return (
            f"{first} and {second} agree on {self.agreed} of "
            f"{count(self.rows, 'row')} that both reviewed{kappa}."
        )


def agreement(
    reviews: Reviews, task: Task, reviewers: tuple[str, str] | None = None
) -> Agreement | None:
    """Compare two reviewers: those given, or the two with the most rows in common.

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
    answers = [
        [_answer(pair[side], task) for pair in both.values()] for side in range(len(reviewers))
    ]
    kappa = None
    if len({*answers[0], *answers[1]}) > 1:
        from sklearn.metrics import cohen_kappa_score

        kappa = float(cohen_kappa_score(*answers))
    return Agreement(reviewers, len(both), len(both) - len(differences), kappa, differences)


def _answer(review: Review, task: Task) -> str:
    """A category of an answer, for kappa."""
    if task.is_free_text or task.part_names:
        return review.decision
    return "-" if review.right_label is None else f"={review.right_label}"


def _same_answer(first: Review, second: Review, task: Task) -> bool:
    """Whether two decisions have the same right label, or are both rejections."""
    if first.right_label is None or second.right_label is None:
        return first.right_label is second.right_label
    return task.correct(first.right_label, second.right_label)
