"""Selective prediction: a system's accuracy on the answers that it is surest of.

The risk-coverage curve gives the share of wrong answers among the surest ones, for every share of
the rows. Rows of equal confidence count as in random order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dsbs.evaluation.bootstrap import (
    Clusters,
    Floats,
    exception_share,
    percentiles,
    resampled_counts,
)
from dsbs.evaluation.calibration import distributions
from dsbs.evaluation.metrics import Scored
from dsbs.records.measures import COVERAGES, Measure, Selective
from dsbs.students.calibration import (
    ConfidenceKind,
    areas,
    confidence_of,
    confidences,
    rationale_agreement,
    tie_groups,
)
from dsbs.tasks import Task

NAMES = ("aurc", "e_aurc", *(f"accuracy_at_{100 * share:.0f}" for share in COVERAGES))
UNREADABLE = -1.0  # the confidence of an answer without a label
_POINTS = 50  # of a curve
_DRAWS = 10_000_000  # rows in all resamples together, which take about a second
_TOGETHER = 200_000  # rows of resamples in memory at once
_MAX_GROUPS = 500  # of rows of equal confidence, in a resample


def kinds_of(files: Sequence[Scored], chosen: Sequence[ConfidenceKind]) -> list[ConfidenceKind]:
    """The kind of confidence of each file: the chosen one, if any, where its answers have it, else
    their probability.
    """
    probabilities: list[ConfidenceKind] = ["probability"] * len(files)
    kinds: list[ConfidenceKind] = []
    for file, kind in zip(files, chosen or probabilities, strict=True):
        needed = "rationale" if kind == "views" else "distribution"
        has_all = all(getattr(prediction, needed) is not None for prediction in file.predictions)
        kinds.append(kind if has_all else "probability")
    return kinds


def confidence_values(file: Scored, task: Task, kind: ConfidenceKind) -> Floats | None:
    """The confidence of each answer, (rows,); None where that of a readable answer is unknown."""
    if kind in ("margin", "entropy") and task.labels is not None:
        shares = distributions(file, task.labels)
        if shares is not None:
            is_readable = np.array([label is not None for label in file.labels])
            return np.where(is_readable, confidences(kind, shares), UNREADABLE)
    values = []
    for row, prediction, label in zip(file.rows, file.predictions, file.labels, strict=True):
        agreement = None
        if kind == "views" and label is not None:
            rationale = prediction.rationale or ""
            agreement = rationale_agreement(label, rationale, task, row.input)
        # probabilities of several labels are no distribution: the row's is all that counts
        shares_of_row = None if task.has_several_labels else prediction.distribution
        value = confidence_of(kind, prediction.probability, shares_of_row, agreement)
        if label is None:
            value = UNREADABLE
        if value is None:
            return None
        values.append(value)
    return np.array(values, dtype=np.float64)


def selective(
    files: Sequence[Scored],
    task: Task,
    chosen: Sequence[ConfidenceKind] = (),
    clusters: Clusters = None,
) -> Selective | None:
    """Selective prediction with one file per seed; None where a confidence is unknown.

    ``chosen`` are the kinds of confidence chosen on valid, if any.
    """
    kinds = kinds_of(files, chosen)
    values = []
    for file, kind in zip(files, kinds, strict=True):
        confidence = confidence_values(file, task, kind)
        if confidence is None:
            return None
        values.append(confidence)
    losses = [(~file.correct).astype(np.float64) for file in files]
    return Selective(
        confidence=list(dict.fromkeys(kinds)),
        measures=risk_measures(values, losses, clusters),
        curve=risk_curve(values, losses),
    )


def risk_measures(
    confidence: Sequence[Floats], losses: Sequence[Floats], clusters: Clusters = None
) -> dict[str, Measure]:
    """Measures of the risk-coverage curve, averaged over seeds, with bootstrap intervals.

    ``confidence`` and ``losses`` (0 or 1): (rows,) for each seed; the same rows are drawn for all.
    """
    n = len(losses[0])
    pairs = list(zip(confidence, losses, strict=True))
    all_rows = np.ones((1, n), dtype=np.uint8)
    point = np.mean([_Order(*pair).measures(all_rows) for pair in pairs], axis=0)[0]
    orders = [_Order(*pair, max_groups=_MAX_GROUPS) for pair in pairs]
    # What joining groups changes is small, and the same in all resamples.
    shift = point - np.mean([order.measures(all_rows) for order in orders], axis=0)[0]
    units = n if clusters is None else len(np.unique(clusters))
    resamples = max(1000, min(2000, _DRAWS // n))
    drawn = []
    weights = _resamples(units, resamples)
    batch = max(1, _TOGETHER // n)
    for start in range(0, resamples, batch):
        row_weights = weights[start : start + batch]
        if clusters is not None:
            row_weights = row_weights[:, clusters]
        drawn.append(np.mean([order.measures(row_weights) for order in orders], axis=0))
    values = np.concatenate(drawn) + shift
    shares = (1.0, 1.0, *COVERAGES)
    return {
        name: Measure(
            value=float(point[i]),
            ci95=_interval(float(point[i]), values[:, i], units * shares[i]),
            n=n,
        )
        for i, name in enumerate(NAMES)
    }


@lru_cache(maxsize=1)
def _resamples(units: int, number: int) -> NDArray[np.uint8]:
    """How often each unit occurs in each resample, (number, units); the same for all systems."""
    counts = np.ones(units, dtype=np.int64)
    return np.concatenate([w.astype(np.uint8) for w in resampled_counts(counts, number)])


def _interval(value: float, resamples: Floats, units: float) -> tuple[float, float]:
    if np.ptp(resamples) > 1e-12:
        return percentiles(resamples)
    share = float(exception_share(max(1, int(units))))
    return value - share * value, value + share * (1 - value)


class _Order:
    """The rows of one seed from the surest to the least sure, in groups of equal confidence.

    Where there are more than ``max_groups``, neighbors are joined.
    """

    def __init__(self, confidence: Floats, losses: Floats, max_groups: int | None = None) -> None:
        self._rows = np.argsort(-confidence, kind="stable")
        ordered = confidence[self._rows]
        self._starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        if max_groups is not None and len(self._starts) > max_groups:
            self._starts = self._starts[np.arange(max_groups) * len(self._starts) // max_groups]
        self._losses = losses[self._rows].astype(np.uint8)

    def measures(self, weights: NDArray[np.uint8]) -> Floats:
        """How often each row was drawn, (resamples, rows) -> (resamples, measures)."""
        ordered = weights[:, self._rows]
        counts = np.add.reduceat(ordered, self._starts, axis=1, dtype=np.float64)
        sums = np.add.reduceat(ordered * self._losses, self._starts, axis=1, dtype=np.float64)
        area = areas(counts, sums)
        accuracies = [1 - _risk_at(counts, sums, share) for share in COVERAGES]
        return np.stack([area, area - _smallest_areas(counts, sums), *accuracies], axis=1)


def _risk_at(counts: Floats, sums: Floats, coverage: float) -> Floats:
    """The mean loss of the surest share of the rows, (resamples, groups) -> (resamples,)."""
    above = counts.cumsum(axis=1)
    rows = coverage * above[:, -1]
    group = np.minimum((above < rows[:, None]).sum(axis=1), counts.shape[1] - 1)
    index = np.arange(len(counts))
    size = counts[index, group]
    inside = rows - (above[index, group] - size)  # of the last group's rows
    mean_loss = sums[index, group] / np.maximum(size, 1)
    losses = sums.cumsum(axis=1)[index, group] - sums[index, group] + inside * mean_loss
    return np.asarray(losses / rows)


def _smallest_areas(counts: Floats, sums: Floats) -> Floats:
    """The areas if all right answers were surer than all wrong ones."""
    wrong = sums.sum(axis=1)
    right = counts.sum(axis=1) - wrong
    return areas(np.stack([right, wrong], axis=1), np.stack([0 * wrong, wrong], axis=1))


def risk_curve(confidence: Sequence[Floats], losses: Sequence[Floats]) -> list[tuple[float, float]]:
    """Points (coverage, risk), averaged over seeds."""
    shares = np.arange(1, _POINTS + 1) / _POINTS
    risks = []
    for values, wrong in zip(confidence, losses, strict=True):
        counts, sums = tie_groups(values, wrong)
        rows = counts[None].astype(np.float64)
        risks.append([float(_risk_at(rows, sums[None], share)[0]) for share in shares])
    means = np.mean(risks, axis=0)
    return [
        (float(share), round(float(risk), 6)) for share, risk in zip(shares, means, strict=True)
    ]
