"""Thresholds of a cascade, chosen on calibration rows with a guarantee.

A student answers where its confidence is at least the threshold, and its teacher elsewhere.

Agreement. The risk is the share of all requests that the student answers, and answers differently
from its teacher. It can only grow as the threshold is lowered, so thresholds are tested from the
strictest down, and the first whose exact binomial (Clopper-Pearson) upper bound exceeds the risk
ends the search: fixed-sequence testing (Angelopoulos et al., Learn then Test, 2021). As the number
of such answers grows with the risk, every row's confidence may serve as a threshold (Bates et al.,
Distribution-Free, Risk-Controlling Prediction Sets, 2021).

Accuracy. It need not change in one direction, so the thresholds are those of a fixed grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbs.config import CascadeSection
from dsbs.evaluation.bootstrap import Clusters, Floats

Bools = NDArray[np.bool_]
FOLDS = 5  # of cross-fitting
_MAX_ROWS = 10_000_000  # more calibration rows are not proposed
# The logistic function of 14 down to -6, and 0: fixed before any row is seen.
GRID = np.append(1 / (1 + np.exp(-np.arange(14, -6.05, -0.1))), 0.0)


@dataclass(frozen=True, slots=True)
class CascadeRows:
    """Rows with a student's and its teacher's answers; all (rows,)."""

    confidence: Floats
    """Negative where the student has no readable answer, so that the teacher answers."""
    agrees: Bools
    """Whether the student's label is the teacher's."""
    correct: Bools
    """Whether the student's label is the gold label."""
    teacher_correct: Bools
    clusters: Clusters = None
    """Which rows belong together, for intervals. Calibration has none: its bound is of rows."""

    def __len__(self) -> int:
        return len(self.confidence)

    def of(self, rows: Bools) -> CascadeRows:
        return CascadeRows(
            self.confidence[rows],
            self.agrees[rows],
            self.correct[rows],
            self.teacher_correct[rows],
            None if self.clusters is None else self.clusters[rows],
        )

    def answered(self, threshold: float | None) -> Bools:
        """Whether the student answers each row."""
        if threshold is None:
            return np.zeros(len(self), dtype=np.bool_)
        return np.asarray(self.confidence >= threshold)


@dataclass(frozen=True, slots=True)
class Choice:
    """A threshold, and what is guaranteed of it."""

    threshold: float | None
    """None: no threshold holds."""
    bound: float | None
    """The upper bound of the risk, or of the loss against the teacher."""
    rows_needed: int | None = None
    """Without a threshold: so many calibration rows might do. None: more do not help."""


def choose(rows: CascadeRows, section: CascadeSection) -> Choice:
    """The loosest threshold that the rows guarantee."""
    if section.of == "agreement":
        differs = ~rows.agrees
        return agreement_threshold(rows.confidence, differs, section.risk, section.confidence)
    if section.margin is not None:
        return margin_threshold(rows, section.margin, section.confidence)
    return accuracy_threshold(rows, section.risk, section.confidence)


# --- bounds


def upper_bound(events: int | NDArray[np.int64], n: int, level: float) -> Floats:
    """The exact upper bound of a probability (Clopper and Pearson, 1934), one-sided.

    events: any shape -> the same shape.
    """
    from scipy.stats import beta

    non_events = np.subtract(n, events)
    bounds = beta.ppf(level, np.add(events, 1), np.maximum(non_events, 1))
    return np.where(non_events > 0, bounds, 1.0)


def most_events(n: int, risk: float, level: float) -> int:
    """The largest number of events in ``n`` rows whose upper bound is at most ``risk``; -1: none.

    The upper bound is at most r where so few events have a chance of at most 1 - level at r.
    """
    from scipy.stats import binom

    events = int(binom.ppf(1 - level, n, risk))
    while events >= 0 and binom.cdf(events, n, risk) > 1 - level:
        events -= 1
    return events


def fewest_rows(section: CascadeSection) -> int:
    """The fewest calibration rows with which any threshold can hold."""
    chance = 1 - section.confidence
    if section.margin is not None:
        chance /= 2
    return math.ceil(math.log(chance) / math.log1p(-section.risk) - 1e-9)


# --- agreement


def agreement_threshold(confidence: Floats, differs: Bools, risk: float, level: float) -> Choice:
    """The loosest threshold with a share of at most ``risk`` answered and different, at ``level``.

    Rows of equal confidence are on the same side of a threshold.
    """
    n = len(confidence)
    order = np.argsort(-confidence, kind="stable")
    ordered = confidence[order]
    events = differs[order].cumsum()
    is_last = np.append(ordered[1:] != ordered[:-1], True)  # of its group of equal confidence
    candidates = np.flatnonzero(is_last & (ordered >= 0))
    allowed = most_events(n, risk, level)
    holding = candidates[events[candidates] <= allowed]
    if not len(holding):
        strictest = 0.0
        if len(candidates) and allowed >= 0:
            strictest = int(events[candidates[0]]) / n
        return Choice(None, None, _rows_needed(strictest, risk, level))
    last = holding[-1]
    # Where every readable answer of these rows may count, so may a less sure one.
    threshold = 0.0 if last == candidates[-1] else float(ordered[last])
    return Choice(threshold, float(upper_bound(int(events[last]), n, level)))


def _rows_needed(share: float, risk: float, level: float) -> int | None:
    """The rows with which a share of events would have an upper bound of at most ``risk``."""
    if share >= risk:
        return None
    high = 1
    while math.ceil(share * high) > most_events(high, risk, level):
        high *= 2
        if high > _MAX_ROWS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if math.ceil(share * middle) > most_events(middle, risk, level):
            low = middle
        else:
            high = middle
    return high


# --- accuracy


def accuracy_threshold(rows: CascadeRows, risk: float, level: float) -> Choice:
    """The loosest threshold at which at most ``risk`` of the cascade's answers are wrong."""
    n = len(rows)
    teacher_wrong = ~rows.teacher_correct
    change = teacher_wrong.astype(np.int64) - ~rows.correct  # where the student answers
    wrong = teacher_wrong.sum() - _sums_above(rows.confidence, change)
    allowed = most_events(n, risk, level)
    last = _last_before_failure(wrong <= allowed)
    if last is None:
        share = float(teacher_wrong.mean()) if allowed >= 0 else 0.0
        return Choice(None, None, _rows_needed(share, risk, level))
    return Choice(float(GRID[last]), float(upper_bound(int(wrong[last]), n, level)))


def margin_threshold(rows: CascadeRows, margin: float, level: float) -> Choice:
    """The loosest threshold with a loss of accuracy of at most ``margin`` against the teacher.

    The loss is the share of rows that only the teacher has right, minus the share that only the
    student has right where it answers; each has an exact bound at half of the error probability.
    """
    half = (1 + level) / 2
    n = len(rows)
    losses = _sums_above(rows.confidence, rows.teacher_correct & ~rows.correct)
    wins = _sums_above(rows.confidence, ~rows.teacher_correct & rows.correct)
    least_won = 1 - upper_bound(n - wins, n, half)
    bounds = upper_bound(losses, n, half) - least_won
    last = _last_before_failure(bounds <= margin)
    if last is None:
        return Choice(None, None, _rows_needed(0.0, margin, half))
    return Choice(float(GRID[last]), float(bounds[last]))


def _sums_above(confidence: Floats, values: NDArray[Any]) -> NDArray[np.int64]:
    """The sum of ``values`` over the rows that the student answers, for each threshold of GRID."""
    order = np.argsort(-confidence, kind="stable")
    sums = np.concatenate([[0], values[order].astype(np.int64).cumsum()])
    return np.asarray(sums[np.searchsorted(-confidence[order], -GRID, side="right")])


def _last_before_failure(holds: Bools) -> int | None:
    """The index before the first False; None if the first is."""
    failures = np.flatnonzero(~holds)
    passed = int(failures[0]) if len(failures) else len(holds)
    return passed - 1 if passed else None


# --- calibration and test rows


@dataclass(frozen=True, slots=True)
class Fitted:
    """A threshold, and which test rows the student answers."""

    choice: Choice
    rows: int
    """Calibration rows."""
    coverage: float
    """Of the calibration rows."""
    test: CascadeRows
    answered: Bools
    folds: int | None = None

    def guaranteed(self, section: CascadeSection) -> float | None:
        """The agreement or accuracy, at least, or with a margin the loss, at most. None: no
        threshold holds.
        """
        bound = self.choice.bound
        if bound is None or section.margin is not None:
            return bound
        return 1 - bound


def fit_and_test(
    rows: CascadeRows, positions: Floats, section: CascadeSection, share: float
) -> Fitted:
    """Choose a threshold on the ``share`` of rows with the lowest positions, and test on the rest.

    ``positions`` (rows,) in [0, 1) are of a hash. Where that share has too few rows for any
    threshold and four fifths of all rows would do, the threshold is chosen on all rows and tested
    by cross-fitting: each fifth with the threshold of the other rows.
    """
    is_calibration = np.asarray(positions < share)
    fewest = fewest_rows(section)
    if is_calibration.sum() >= fewest or len(rows) * (FOLDS - 1) // FOLDS < fewest:
        calibration = rows.of(is_calibration)
        return fit_on(calibration, rows.of(~is_calibration), section)
    fold = np.floor(positions * FOLDS).astype(np.int64)
    answered = np.zeros(len(rows), dtype=np.bool_)
    for number in range(FOLDS):
        inside = fold == number
        if inside.any() and not inside.all():
            threshold = choose(rows.of(~inside), section).threshold
            answered[inside] = rows.of(inside).answered(threshold)
    return replace(fit_on(rows, rows, section), answered=answered, folds=FOLDS)


def fit_on(calibration: CascadeRows, test: CascadeRows, section: CascadeSection) -> Fitted:
    """Choose a threshold on calibration rows, and apply it to test rows."""
    choice = Choice(None, None, fewest_rows(section))
    coverage = 0.0
    if len(calibration):
        choice = choose(calibration, section)
        coverage = float(calibration.answered(choice.threshold).mean())
    answered = test.answered(choice.threshold)
    return Fitted(choice, len(calibration), coverage, test, answered)
