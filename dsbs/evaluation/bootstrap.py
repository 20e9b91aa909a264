"""Bootstrap confidence intervals, over rows of the test set or over clusters of rows.

The percentile bootstrap (Efron and Tibshirani, 1993, section 13.3). A *unit* is a row, or a cluster
of rows. Equal units are interchangeable, so a resample is one multinomial draw of how often each
distinct unit occurs: the same distribution as drawing units one at a time, and faster where many
are equal. Draws are seeded: equal data give equal intervals. Scores of several seeds are averaged
within a row before rows are resampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsbs.records.measures import wilson

RESAMPLES = 9_999
SEED = 20230503

Floats = NDArray[np.float64]
Scores = Floats  # (rows,) in [0, 1]: a row's correctness, averaged over seeds
Clusters = NDArray[np.int64] | None  # (rows,): each row's cluster; None: every row is a unit

_DRAWN_TOGETHER = 32  # one binomial draw costs about as much as this many single draws
_BATCH = 100_000  # draws or weights in memory at once: they fit a core's cache
_MAX_COUNTS = 4_000_000  # counts passed to a statistic at once: 32 MB


@dataclass(frozen=True, slots=True)
class Accuracy:
    """An accuracy, its 95% interval and the name of the interval's method."""

    value: float
    ci95: tuple[float, float]
    interval: str


def accuracy(scores: Scores, seeds: int, clusters: Clusters = None) -> Accuracy:
    """Accuracy with Wilson's interval for one seed without clusters, otherwise bootstrapped.

    A mean over seeds is not a count of successes, and clustered rows are not independent trials.
    Raises ValueError for no rows, NaN, or clusters of another length.
    """
    values = validated(scores, clusters)
    if seeds == 1 and clusters is None and is_binary(values):
        rate = wilson(int(values.sum()), len(values))
        assert rate is not None
        return Accuracy(rate.value, rate.ci95, "wilson")
    units = "rows" if clusters is None else "clusters"
    return Accuracy(
        float(values.mean()), mean_interval(values, clusters), f"bootstrap over {units}"
    )


def mean_interval(
    values: Floats, clusters: Clusters = None, lowest: float = 0.0, highest: float = 1.0
) -> tuple[float, float]:
    """The 95% interval of a mean over rows; with clusters, whole clusters are drawn.

    ``values`` (rows,): real numbers. Neither their order nor the numbering of clusters matters.
    Where all units have the same mean, resampling would show no spread; the interval then allows
    for `exception_share` of the units at ``lowest`` or ``highest`` (or at the most extreme value,
    where that lies further out). Raises ValueError for no rows, NaN, or clusters of another length.
    """
    values = validated(values, clusters)
    units = sums_and_sizes(values, clusters)
    means = units[:, 0] / units[:, 1]
    if np.ptp(means) <= 1e-12 * np.abs(means).max():
        mean = float(values.mean())
        share = float(exception_share(len(units)))
        low = min(lowest, float(values.min()))
        high = max(highest, float(values.max()))
        return mean - share * (mean - low), mean + share * (high - mean)
    if clusters is None:
        return percentiles(resampled_sums(units[:, :1])[:, 0] / len(values))
    sums = resampled_sums(units)
    return percentiles(sums[:, 0] / sums[:, 1])


# --- statistics of counts


def counts_interval(
    kinds: NDArray[np.int64],
    statistic: Callable[[Floats], Floats],
    clusters: Clusters = None,
    num_kinds: int | None = None,
) -> tuple[float, float]:
    """The 95% interval of a statistic of how many rows there are of each kind.

    ``kinds`` (rows,): integers in [0, K), such as cells of a confusion matrix; K is ``num_kinds``,
    by default the largest kind plus one. ``statistic`` maps counts (R, K) to (R,), NaN where it is
    undefined (a class was not drawn); such resamples are left out. Where the other resamples show
    no spread, for instance because all rows of a small class are right, each kind in turn may
    have been another in `exception_share` of its rows, and the interval covers the results.

    Raises ValueError for no rows, a kind out of range, clusters of another length, or a statistic
    that is undefined on the data itself.
    """
    validated(kinds, clusters)
    kinds = np.asarray(kinds)
    too_large = num_kinds is not None and kinds.max() >= num_kinds
    if not np.issubdtype(kinds.dtype, np.integer) or kinds.min() < 0 or too_large:
        raise ValueError(f"kinds must be integers from 0 to {num_kinds or 'K'} - 1")
    if num_kinds is None:
        num_kinds = int(kinds.max()) + 1
    present, kind_of_row, counts = np.unique(kinds, return_inverse=True, return_counts=True)

    def evaluate(weights: Floats) -> Floats:
        """(R, present kinds) -> (R,)"""
        batch = max(1, _MAX_COUNTS // num_kinds)
        results = []
        for start in range(0, len(weights), batch):
            rows = weights[start : start + batch]
            all_kinds = np.zeros((len(rows), num_kinds))
            all_kinds[:, present] = rows
            results.append(np.asarray(statistic(all_kinds), dtype=np.float64))
        return np.concatenate(results)

    point = float(evaluate(counts[None].astype(np.float64))[0])
    if not np.isfinite(point):
        raise ValueError("the statistic of all rows is not defined")
    if clusters is None:
        units_of_kind = counts
        resamples = np.concatenate([evaluate(weights) for weights in resampled_counts(counts)])
    else:
        names, cluster_of_row = np.unique(clusters, return_inverse=True)
        cells = np.bincount(
            cluster_of_row * len(present) + kind_of_row, minlength=len(names) * len(present)
        )
        units = cells.reshape(len(names), -1).astype(np.float64)
        units_of_kind = (units > 0).sum(axis=0)
        resamples = evaluate(resampled_sums(units))
    resamples = resamples[np.isfinite(resamples)]
    if len(resamples) and np.ptp(resamples) > 1e-12:
        return percentiles(resamples)
    all_counts = np.zeros(num_kinds)
    all_counts[present] = counts
    return _range_with_exceptions(point, all_counts, present, units_of_kind, statistic)


def _range_with_exceptions(
    point: float,
    counts: Floats,
    present: NDArray[np.int64],
    units_of_kind: NDArray[np.int64],
    statistic: Callable[[Floats], Floats],
) -> tuple[float, float]:
    """The statistic's range when, one kind at a time, some of its rows are of any other kind.

    ``counts`` (K,); ``present`` and ``units_of_kind`` (present kinds,).
    """
    num_kinds = len(counts)
    low = high = point
    batch = max(1, _MAX_COUNTS // num_kinds)
    for kind, share in zip(present, exception_share(units_of_kind), strict=True):
        moved_rows = share * counts[kind]
        for start in range(0, num_kinds, batch):
            targets = np.arange(start, min(num_kinds, start + batch))
            moved = np.tile(counts, (len(targets), 1))
            moved[:, kind] -= moved_rows
            moved[np.arange(len(targets)), targets] += moved_rows
            results = np.asarray(statistic(moved), dtype=np.float64)
            results = results[np.isfinite(results)]
            low = min(low, results.min(initial=low))
            high = max(high, results.max(initial=high))
    return float(low), float(high)


# --- label efficiency


def label_efficiency(
    curve: Sequence[tuple[int, Scores]], target: Scores, clusters: Clusters = None
) -> tuple[int | None, tuple[int | None, int | None]]:
    """The training rows at which a curve first reaches a target's accuracy, with their 95% CI.

    ``curve``: (training rows, scores) of one method, in any order. ``target``: another system's
    scores. All scores are of the same test rows. Between points, accuracy is linear in
    log(training rows). A target below the first point needs at most that point's rows, which are
    returned. None: not reached within the rows tried. Test rows (or clusters) are resampled for
    curve and target together; a resample that does not reach its target counts as infinity.

    Raises ValueError for an empty curve, a point without training rows, or scores of other rows.
    """
    target = validated(target, clusters)
    points = [(rows, validated(scores)) for rows, scores in curve]
    points.sort(key=lambda point: point[0])
    if not points or points[0][0] < 1:
        raise ValueError("a curve needs one point or more, each with at least one training row")
    for rows, scores in points:
        if len(scores) != len(target):
            raise ValueError(
                f"{len(scores)} test rows at {rows} training rows "
                f"against {len(target)} of the target"
            )
    log_rows = np.log([rows for rows, _ in points])
    gaps = np.stack([paired_differences(scores, target) for _, scores in points], axis=1)
    units = unit_sums(gaps, clusters)
    mean = gaps.mean(axis=0)
    crossing = _crossings(mean[None], log_rows)[0]
    unit_means = units / unit_sums(np.ones((len(target), 1)), clusters)
    if np.ptp(unit_means, axis=0).max() < 1e-12:
        share = exception_share(len(units))
        extremes = np.stack([mean + share * (1 - mean), mean - share * (1 + mean)])
        ends = _crossings(extremes, log_rows)
    else:
        # A curve crosses its target where the sums do, so sums need not be divided by sizes.
        crossings = _crossings(resampled_sums(units), log_rows)
        ends = np.quantile(crossings, (0.025, 0.975), method="inverted_cdf")
    return _whole_rows(crossing), (_whole_rows(ends[0]), _whole_rows(ends[1]))


def _crossings(gaps: Floats, log_rows: Floats) -> Floats:
    """The log rows (R,) at which gaps to the target (R, points) first reach 0, or infinity."""
    reached = gaps >= -1e-9  # sums of thirds are zero only up to rounding
    first = reached.argmax(axis=1)
    before = np.maximum(first - 1, 0)
    resamples = np.arange(len(gaps))
    low = gaps[resamples, before]
    high = gaps[resamples, first]
    rise = np.where(first > 0, high - low, 1.0)
    interpolated = log_rows[before] - (log_rows[first] - log_rows[before]) * low / rise
    crossing = np.where(first > 0, interpolated, log_rows[0])
    return np.where(reached.any(axis=1), np.minimum(crossing, log_rows[first]), np.inf)


def _whole_rows(log_rows: float) -> int | None:
    """The whole number of rows that suffices; a millionth of a row is rounding."""
    if math.isinf(log_rows):
        return None
    return math.ceil(math.exp(log_rows) - 1e-6)


# --- units and resamples


def validated(values: ArrayLike, clusters: Clusters = None) -> Floats:
    """``values`` as (rows,) floats.

    Raises ValueError for no rows, NaN, infinity, or clusters of another length.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(
            f"expected one value for each of at least one row, not shape {array.shape}"
        )
    finite = np.isfinite(array)
    if not finite.all():
        raise ValueError(f"row {int(np.flatnonzero(~finite)[0])} is not a finite number")
    if clusters is not None and np.shape(clusters) != array.shape:
        raise ValueError(f"{len(array)} rows against clusters of shape {np.shape(clusters)}")
    return array


def is_binary(values: Floats) -> bool:
    """Whether every value is 0 or 1."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def paired_differences(first: Floats, second: Floats) -> Floats:
    """``first`` minus ``second``, (rows,). Means over seeds that differ only by rounding give 0."""
    differences: Floats = np.round(first - second, 15) + 0.0  # adding 0.0 turns -0.0 into 0.0
    return differences


def sums_and_sizes(values: Floats, clusters: Clusters) -> Floats:
    """(units, 2): each unit's sum of values, and its number of rows."""
    return unit_sums(np.stack([values, np.ones(len(values))], axis=1), clusters)


def unit_sums(columns: Floats, clusters: Clusters) -> Floats:
    """(rows, C) -> (units, C): sums over each cluster, by cluster number; the rows themselves
    where there are no clusters."""
    if clusters is None:
        return columns
    ordered = np.sort(clusters)
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    # A cluster's rows are added from the smallest up: otherwise rounding depends on their order.
    sums = [np.add.reduceat(column[np.lexsort((column, clusters))], starts) for column in columns.T]
    return np.stack(sums, axis=1)


def resampled_counts(counts: NDArray[np.int64], resamples: int = RESAMPLES) -> Iterator[Floats]:
    """How often each of D distinct units occurs in each resample: arrays (b, D).

    ``counts`` (D,): how often each occurs in the data. Equal counts give equal draws.
    """
    rng = np.random.default_rng(SEED)
    total = int(counts.sum())
    num_distinct = len(counts)
    frequent = np.flatnonzero(counts >= _DRAWN_TOGETHER)
    # Rare units are drawn one at a time, from a list that repeats each as often as it occurs.
    rare = np.repeat(np.arange(num_distinct), np.where(counts < _DRAWN_TOGETHER, counts, 0))
    shares = counts[frequent] / total
    if len(rare):  # numpy would draw a last share of 0 where rounding leaves the sum below 1
        shares = np.append(shares, len(rare) / total)
    batch = max(1, _BATCH // max(len(rare), num_distinct))
    for start in range(0, resamples, batch):
        size = min(batch, resamples - start)
        drawn = rng.multinomial(total, shares, size=size)
        weights = np.zeros((size, num_distinct))
        if len(rare):
            cells = np.repeat(np.arange(size) * num_distinct, drawn[:, -1])
            cells += rare[rng.integers(0, len(rare), size=len(cells))]
            occurrences = np.bincount(cells, minlength=size * num_distinct)
            weights = occurrences.reshape(size, num_distinct).astype(np.float64)
        weights[:, frequent] = drawn[:, : len(frequent)]
        yield weights


def resampled_sums(units: Floats) -> Floats:
    """(units, C) -> (RESAMPLES, C): sums over as many units, drawn with replacement."""
    from scipy.sparse import csr_array

    distinct, counts = np.unique(units, axis=0, return_counts=True)
    if np.count_nonzero(distinct) < distinct.size / 10:  # counts of many kinds in small clusters
        distinct = csr_array(distinct)
    return np.concatenate([weights @ distinct for weights in resampled_counts(counts)])


def percentiles(resamples: Floats) -> tuple[float, float]:
    """The 2.5th and 97.5th percentiles of (RESAMPLES,)."""
    low, high = np.quantile(resamples, (0.025, 0.975))
    return float(low), float(high)


def exception_share(units: int | NDArray[np.int64]) -> Floats:
    """The share of exceptions that observing none in ``units`` units cannot rule out.

    The upper Clopper-Pearson limit for 0 of n, 1 - 0.025^(1/n), used where equal units would make
    a resampled interval collapse to a point.
    """
    return np.asarray(1 - 0.025 ** (1 / np.asarray(units, dtype=np.float64)))
