"""Aggregates: measures that are functions of sums over rows, such as F1 and kappa.

Rows, or clusters of them, are the units of intervals and tests. What a row adds is averaged over
seeds first, so that several seeds count as one system that answers with any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbs.evaluation.bootstrap import (
    Clusters,
    Floats,
    exception_share,
    percentiles,
    resampled_counts,
)
from dsbs.evaluation.significance import paired_difference, sign_patterns
from dsbs.records.measures import Interval, Measure

RowValues = NDArray[np.float64]  # (seeds, rows); NaN where a metric is undefined for a row
Statistic = Callable[[Floats], Floats]  # sums (R, C) -> (R,) or (R, measures); NaN: undefined
_MAX_SUMS = 4_000_000  # passed to a statistic at once: 32 MB


@dataclass(frozen=True, slots=True)
class RowSums:
    """What each row adds to the sums that a measure is a function of."""

    rows: Any
    """(rows, C), a sparse array."""
    kinds: NDArray[np.int64]
    """(rows,): equal numbers for equal rows."""
    statistic: Statistic
    lowest: float = 0.0
    """The measure's lowest value; its highest is 1."""

    @classmethod
    def of(cls, values: Floats, statistic: Statistic) -> RowSums:
        """Of dense ``values``, (rows, C)."""
        from scipy.sparse import csr_array

        _, kinds = np.unique(values, axis=0, return_inverse=True)
        return cls(csr_array(values), kinds.ravel(), statistic)

    @property
    def value(self) -> Floats:
        """The measure of all rows, () or (measures,)."""
        return np.asarray(_applied(self.statistic, np.ones((1, len(self.kinds))), self.rows)[0])

    def measure(self, clusters: Clusters = None) -> Measure | None:
        """The measure with its bootstrap interval. None: it is undefined."""
        value = float(self.value)
        if not np.isfinite(value):
            return None
        interval = interval_of(
            value, self.resamples(clusters), self.num_units(clusters), self.lowest, 1.0
        )
        return Measure(value=value, ci95=interval, n=len(self.kinds))

    def resamples(self, clusters: Clusters) -> Floats:
        """The measure in each bootstrap resample, (RESAMPLES,) or (RESAMPLES, measures)."""
        units, counts = self.units(clusters)
        return np.concatenate(
            [_applied(self.statistic, weights, units) for weights in resampled_counts(counts)]
        )

    def num_units(self, clusters: Clusters) -> int:
        return len(self.kinds) if clusters is None else len(np.unique(clusters))

    def units(self, clusters: Clusters) -> tuple[Any, NDArray[np.int64]]:
        """The distinct units' sums, (D, C), sparse, and how often each occurs, (D,)."""
        if clusters is not None:
            sums = cluster_sums(self.rows, clusters)
            return sums, np.ones(sums.shape[0], dtype=np.int64)
        _, first, counts = np.unique(self.kinds, return_index=True, return_counts=True)
        return self.rows[first], counts


@dataclass(frozen=True, slots=True)
class GradedDifference:
    """A paired difference by a metric other than accuracy, and a two-sided p value."""

    delta: float
    ci95: Interval
    p: float
    test: str
    n: int  # rows


def graded_difference(
    ours: RowValues | RowSums, theirs: RowValues | RowSums, clusters: Clusters = None
) -> GradedDifference | None:
    """Compare two systems on the same rows. None: the metric is undefined for one of them.

    Means over rows by `paired_difference`, on the rows for which both systems have a value; other
    measures by `sums_difference`.
    """
    if isinstance(ours, RowSums) and isinstance(theirs, RowSums):
        return sums_difference(ours, theirs, clusters)
    assert not isinstance(ours, RowSums) and not isinstance(theirs, RowSums)
    both = ~(np.isnan(ours).all(axis=0) | np.isnan(theirs).all(axis=0))
    if not both.any():
        return None
    difference = paired_difference(
        np.nanmean(ours[:, both], axis=0),
        np.nanmean(theirs[:, both], axis=0),
        None if clusters is None else clusters[both],
    )
    return GradedDifference(
        difference.delta, difference.ci95, difference.p, difference.test, int(both.sum())
    )


def sums_difference(
    ours: RowSums, theirs: RowSums, clusters: Clusters = None
) -> GradedDifference | None:
    """Compare two systems by an aggregate. None: it is undefined for one of them.

    p: randomization (Noreen, 1989; Yeh, 2000). If the systems were equal, the answers to each unit
    could as well be exchanged; all exchanges where there are at most 9,999, else as many drawn ones
    with the observed one counted among them. An exchange that leaves a measure undefined counts
    as a difference as large as the observed one. ci95: paired bootstrap.
    """
    from scipy.sparse import hstack

    columns = ours.rows.shape[1]

    def difference(sums: Floats) -> Floats:
        return ours.statistic(sums[:, :columns]) - ours.statistic(sums[:, columns:])

    _, kinds = np.unique(np.stack([ours.kinds, theirs.kinds]), axis=1, return_inverse=True)
    both = RowSums(hstack([ours.rows, theirs.rows]).tocsr(), kinds.ravel(), difference)
    delta = float(both.value)
    if not np.isfinite(delta):
        return None
    reach = 1 - ours.lowest
    p, is_exact = _randomization(both, columns, delta, clusters)
    test = "exact randomization" if is_exact else "approximate randomization"
    return GradedDifference(
        delta=delta,
        ci95=interval_of(delta, both.resamples(clusters), both.num_units(clusters), -reach, reach),
        p=p,
        test=test if clusters is None else f"{test} over clusters",
        n=len(both.kinds),
    )


def _randomization(
    both: RowSums, columns: int, delta: float, clusters: Clusters
) -> tuple[float, bool]:
    """The p value, and whether all exchanges were tried. ``both``: the systems side by side."""
    order = np.argsort(both.kinds, kind="stable")  # the draws do not depend on the order of rows
    rows = both.rows[order] if clusters is None else cluster_sums(both.rows, clusters)
    total = np.asarray(rows.sum(axis=0)).ravel()
    total = total[:columns] + total[columns:]
    changes = rows[:, :columns] - rows[:, columns:]
    changes.eliminate_zeros()
    changes = changes[np.diff(changes.indptr) > 0]

    def absolute(sums: Floats) -> Floats:
        ours = both.statistic(np.hstack([total + sums, total - sums]) / 2)
        return np.where(np.isfinite(ours), np.abs(ours), np.inf)

    hits = tried = 0
    for signs in sign_patterns(changes.shape[0]):
        hits += int((_applied(absolute, signs, changes) >= abs(delta) - 1e-12).sum())
        tried += len(signs)
    if tried == 2 ** changes.shape[0]:
        return hits / tried, True
    return (hits + 1) / (tried + 1), False


def interval_of(
    value: float, resamples: Floats, units: int, lowest: float, highest: float
) -> Interval:
    """The 95% interval of a measure from its resamples; undefined ones are left out.

    Where they show no spread, as if all units were equal, it allows for `exception_share` of
    ``units`` with the measure's lowest or highest value.
    """
    resamples = resamples[np.isfinite(resamples)]
    if len(resamples) and np.ptp(resamples) > 1e-12:
        return percentiles(resamples)
    share = float(exception_share(max(1, units)))
    return value - share * (value - lowest), value + share * (highest - value)


def cluster_sums(rows: Any, clusters: NDArray[np.int64]) -> Any:
    """(rows, C) -> (clusters, C), sparse."""
    from scipy.sparse import csr_array

    names, number = np.unique(clusters, return_inverse=True)
    shape = (len(names), len(number))
    of_cluster = csr_array((np.ones(len(number)), (number, np.arange(len(number)))), shape=shape)
    return (of_cluster @ rows).tocsr()


def _applied(statistic: Statistic, weights: Floats, units: Any) -> Floats:
    """The statistic of weighted sums: (R, units) and (units, C) -> (R,) or (R, measures)."""
    batch = max(1, _MAX_SUMS // max(1, units.shape[1]))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.concatenate(
            [
                np.asarray(statistic(weights[start : start + batch] @ units))
                for start in range(0, len(weights), batch)
            ]
        )
