"""Metrics of labels that are points of a scale.

An unreadable output counts as the point furthest from the gold one, so that no system gains from
answers that cannot be read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsbs.evaluation.aggregates import RowSums, RowValues, Statistic
from dsbs.evaluation.bootstrap import Floats
from dsbs.evaluation.metrics import Metric, SystemPredictions, truth_and_predicted
from dsbs.tasks import Task


@dataclass(frozen=True, slots=True)
class _Places:
    """Places on the scale, from 0."""

    truth: NDArray[np.int64]  # (rows,)
    predicted: NDArray[np.int64]  # (seeds, rows)
    points: Floats  # (points,)


def _places(predictions: SystemPredictions) -> _Places | None:
    """None: the task's labels have no order."""
    task = predictions.task
    if not task.has_order:
        return None
    points = _points(task)
    truth, predicted = truth_and_predicted(predictions)
    last = len(points) - 1
    furthest = np.where(2 * truth >= last, 0, last)
    return _Places(truth, np.where(predicted > last, furthest, predicted), points)


def _points(task: Task) -> Floats:
    """The scale's points, in order."""
    return np.array([task.number(label) for label in task.labels or ()], dtype=np.float64)


def _absolute_error(predictions: SystemPredictions) -> RowValues | None:
    places = _places(predictions)
    if places is None:
        return None
    return np.asarray(np.abs(places.points[places.predicted] - places.points[places.truth]))


def _within_one(predictions: SystemPredictions) -> RowValues | None:
    places = _places(predictions)
    if places is None:
        return None
    return np.asarray(np.abs(places.predicted - places.truth) <= 1, dtype=np.float64)


def _joint_sums(predictions: SystemPredictions, statistic: Statistic) -> RowSums | None:
    """The joint counts of gold and predicted points, (rows, points squared)."""
    from scipy.sparse import csr_array

    places = _places(predictions)
    if places is None:
        return None
    seeds, rows = places.predicted.shape
    cells = places.truth * len(places.points) + places.predicted  # (seeds, rows)
    shape = (rows, len(places.points) ** 2)
    counts = csr_array(
        (np.full(seeds * rows, 1 / seeds), (np.tile(np.arange(rows), seeds), cells.ravel())),
        shape=shape,
    )
    _, kinds = np.unique(np.sort(cells, axis=0), axis=1, return_inverse=True)
    return RowSums(counts, kinds.ravel(), statistic, lowest=-1.0)


def quadratic_kappa(joint: Floats) -> Floats:
    """(R, points squared) joint counts -> (R,). NaN where all are of one and the same point."""
    counts = _squares(joint)
    num_points = counts.shape[1]
    places = np.arange(num_points, dtype=np.float64)
    distances = (places[:, None] - places) ** 2
    observed = (counts * distances).sum(axis=(1, 2))
    gold, predicted = counts.sum(axis=2), counts.sum(axis=1)
    expected = ((gold @ distances) * predicted).sum(axis=1) / gold.sum(axis=1)
    return np.asarray(1 - observed / np.where(expected > 0, expected, np.nan))


def spearman(joint: Floats) -> Floats:
    """(R, points squared) joint counts -> (R,). NaN where one of both does not vary.

    Pearson's correlation of midranks.
    """
    counts = _squares(joint)
    gold, predicted = _centered_ranks(counts.sum(axis=2)), _centered_ranks(counts.sum(axis=1))
    covariance = (gold * (counts @ predicted[:, :, None])[:, :, 0]).sum(axis=1)
    variances = (counts.sum(axis=2) * gold**2).sum(axis=1) * (
        counts.sum(axis=1) * predicted**2
    ).sum(axis=1)
    return np.asarray(covariance / np.sqrt(np.where(variances > 1e-9, variances, np.nan)))


def _squares(joint: Floats) -> Floats:
    num_points = round(joint.shape[1] ** 0.5)
    return joint.reshape(-1, num_points, num_points)


def _centered_ranks(counts: Floats) -> Floats:
    """(R, points) counts -> midranks minus their mean, (R, points)."""
    return np.asarray(counts.cumsum(axis=1) - counts / 2 - counts.sum(axis=1)[:, None] / 2)


QUADRATIC_KAPPA = Metric(
    title="Quadratic weighted kappa",
    source="Cohen, 1968: agreement beyond chance, with squared distances",
    higher_is_better=True,
    is_fraction=False,
    compares_systems=True,
    sums=lambda predictions: _joint_sums(predictions, quadratic_kappa),
)
SPEARMAN = Metric(
    title="Spearman's correlation",
    source="Spearman, 1904: correlation of the ranks",
    higher_is_better=True,
    is_fraction=False,
    compares_systems=True,
    sums=lambda predictions: _joint_sums(predictions, spearman),
)
MEAN_ABSOLUTE_ERROR = Metric(
    title="Mean absolute error",
    source="mean distance to the gold score, in units of the scale",
    higher_is_better=False,
    is_fraction=False,
    compares_systems=True,
    row_values=_absolute_error,
    highest=lambda task: abs(_points(task)[-1] - _points(task)[0]),
)
WITHIN_ONE = Metric(
    title="Within one step",
    source="share of the rows at most one step from the gold score",
    higher_is_better=True,
    compares_systems=True,
    row_values=_within_one,
)
