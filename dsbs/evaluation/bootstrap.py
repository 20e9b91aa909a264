"""The percentile bootstrap (Efron and Tibshirani, 1993, section 13.3), drawn as counts of equal units.

A unit is a row, or a cluster of rows. Units that are equal need no telling apart, so a resample is one multinomial draw of how
often each distinct unit occurs: the same distribution as drawing units one by one, and faster where many are equal.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 9_999
SEED = 20230503

Floats = NDArray[np.float64]
Scores = Floats  # (rows,) in [0, 1]: a row's correctness, averaged over seeds
Clusters = (
    NDArray[np.int64] | None
)  # (rows,): the number of a row's cluster; None: every row is its own

_OFTEN = 32  # one binomial draw costs about as much as so many single draws
_BATCH = 100_000  # draws or weights held at once: they stay in a core's cache


def checked(values: ArrayLike, clusters: Clusters = None) -> Floats:
    """The values as (rows,) floats. Raises ValueError for no row, NaN, infinity, or clusters of other rows."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(
            f"one value for each of at least one row is needed, not an array of shape {array.shape}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"row {int(np.flatnonzero(~np.isfinite(array))[0])} is no finite number")
    if clusters is not None and np.shape(clusters) != array.shape:
        raise ValueError(f"{len(array)} rows against clusters of shape {np.shape(clusters)}")
    return array


def paired(first: Floats, second: Floats) -> Floats:
    """First less second, (rows,). Means over seeds that are equal but for rounding differ by nothing."""
    gaps: Floats = np.round(first - second, 15) + 0.0  # no -0.0
    return gaps


def unit_sums(columns: Floats, clusters: Clusters) -> Floats:
    """(rows, C) -> (units, C): sums over each cluster, in the order of the clusters' numbers; the rows where there are none."""
    if clusters is None:
        return columns
    ordered = np.sort(clusters)
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    # a cluster's rows are added from the least up: in the order given, rounding would depend on it
    sums = [np.add.reduceat(column[np.lexsort((column, clusters))], starts) for column in columns.T]
    return np.stack(sums, axis=1)


def draws(counts: NDArray[np.int64]) -> Iterator[Floats]:
    """How often each of D distinct units occurs in each resample: arrays (b, D), RESAMPLES rows in all.

    ``counts`` (D,): how often it occurs in the data; each resample has as many units. Seeded: equal counts, equal draws.
    """
    rng = np.random.default_rng(SEED)
    total, kinds = int(counts.sum()), len(counts)
    often = np.flatnonzero(counts >= _OFTEN)
    others = np.repeat(np.arange(kinds), np.where(counts < _OFTEN, counts, 0))  # drawn one by one
    shares = counts[often] / total
    if len(
        others
    ):  # a last share of zero would still be drawn where rounding leaves the others' sum under 1
        shares = np.append(shares, len(others) / total)
    batch = max(1, _BATCH // max(len(others), kinds))
    for start in range(0, RESAMPLES, batch):
        size = min(batch, RESAMPLES - start)
        drawn = rng.multinomial(total, shares, size=size)
        weights = np.zeros((size, kinds))
        if len(others):
            left = drawn[:, -1]
            cells = np.repeat(np.arange(size) * kinds, left)
            cells += others[rng.integers(0, len(others), size=len(cells))]
            weights = (
                np.bincount(cells, minlength=size * kinds).reshape(size, kinds).astype(np.float64)
            )
        weights[:, often] = drawn[:, : len(often)]
        yield weights


def resampled_sums(units: Floats) -> Floats:
    """(units, C) -> (RESAMPLES, C): the columns' sums over as many units drawn with replacement. Their order has no effect."""
    from scipy.sparse import csr_array

    distinct, counts = np.unique(units, axis=0, return_counts=True)
    if np.count_nonzero(distinct) < distinct.size / 10:  # counts of many kinds in small clusters
        distinct = csr_array(distinct)
    return np.concatenate([weights @ distinct for weights in draws(counts)])


def percentiles(found: Floats) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of (RESAMPLES,)."""
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def room(units: int | NDArray[np.int64]) -> Floats:
    """The share of exceptions that so many units without one still allow: 0 of n has the 97.5 % Clopper-Pearson limit
    1 - 0.025^(1/n). It stands in where resampling equal units would show no spread."""
    return np.asarray(1 - 0.025 ** (1 / np.asarray(units, dtype=np.float64)))
