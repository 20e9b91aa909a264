"""Intervals and tests. Rows of the test set are the units, or clusters of them; seeds are averaged within a row first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsbs.evaluation.bootstrap import (
    Clusters,
    Floats,
    Scores,
    checked,
    draws,
    paired,
    percentiles,
    resampled_sums,
    room,
    unit_sums,
)
from dsbs.evaluation.curve import needed
from dsbs.evaluation.permutation import flip_test
from dsbs.evaluation.power import minimum_detectable_effect
from dsbs.records.results import wilson

__all__ = [
    "Accuracy",
    "Clusters",
    "Difference",
    "Scores",
    "accuracy",
    "counts_interval",
    "difference",
    "holm",
    "mean_interval",
    "needed",
]

_CELLS = 4_000_000  # counts handed to a statistic at once: 32 MB


@dataclass(frozen=True, slots=True)
class Accuracy:
    """An accuracy with its 95 % interval and the interval's name."""

    value: float
    ci95: tuple[float, float]
    interval: str


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference of accuracies (points as fractions), its 95 % interval and a two-sided p value.

    ``wins`` rows have the higher score in the first system, ``losses`` ones in the second. ``minimum_detectable_effect`` is the smallest true
    difference that so many rows would show with 80 % power at .05 (power.py); None where no row differs, or none would show.
    """

    delta: float
    ci95: tuple[float, float]
    p: float
    test: str
    wins: int
    losses: int
    minimum_detectable_effect: float | None


def accuracy(scores: Scores, seeds: int, clusters: Clusters = None) -> Accuracy:
    """One seed without clusters: Wilson's interval. Otherwise a percentile bootstrap over rows or clusters.

    A mean over seeds is no count of successes, and neither are rows that belong together. Raises ValueError for no row, NaN, or
    clusters of other rows.
    """
    values = checked(scores, clusters)
    if seeds == 1 and clusters is None and _right_or_wrong(values):
        rate = wilson(int(values.sum()), len(values))
        assert rate is not None
        return Accuracy(rate.value, rate.ci95, "wilson")
    over = "rows" if clusters is None else "clusters"
    return Accuracy(float(values.mean()), mean_interval(values, clusters), f"bootstrap over {over}")


def mean_interval(
    values: Floats, clusters: Clusters = None, lowest: float = 0.0
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a mean over rows; with clusters, whole ones are drawn.

    ``values`` (rows,): any real numbers. Their order has no effect, nor have the clusters' numbers. Resampling rows (clusters)
    whose means are all equal would show no spread: then the interval leaves room for exceptions as far off as ``lowest`` and 1,
    or the values themselves where they lie outside. Raises ValueError for no row, NaN, or clusters of other rows.
    """
    values = checked(values, clusters)
    units = _sums_and_sizes(values, clusters)
    means = units[:, 0] / units[:, 1]
    if np.ptp(means) <= 1e-12 * np.abs(means).max():
        mean, share = float(values.mean()), float(room(len(units)))
        least, most = min(lowest, float(values.min())), max(1.0, float(values.max()))
        return mean - share * (mean - least), mean + share * (most - mean)
    if clusters is None:
        return percentiles(resampled_sums(units[:, :1])[:, 0] / len(values))
    sums = resampled_sums(units)
    return percentiles(sums[:, 0] / sums[:, 1])


def counts_interval(
    kinds: NDArray[np.int64],
    statistic: Callable[[Floats], Floats],
    clusters: Clusters = None,
    cells: int | None = None,
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a number that follows from how many rows there are of each kind.

    ``kinds`` (rows,): integers from 0 to K - 1, such as the cell of a confusion matrix; K is ``cells``, or the largest kind and
    one where that is None. ``statistic`` maps counts, floats (R, K), to (R,); NaN where it is undefined (a class that was not
    drawn): such resamples are left out. Where the others show no spread, as of a class whose few rows are all right, each kind
    in turn may have been another in as many rows as its number allows (``room``), and the interval holds what follows.
    Raises ValueError for no row, a kind outside 0 to K - 1, clusters of other rows, and where the statistic of all rows is NaN.
    """
    checked(kinds, clusters)
    kinds = np.asarray(kinds)
    if (
        not np.issubdtype(kinds.dtype, np.integer)
        or kinds.min() < 0
        or (cells is not None and kinds.max() >= cells)
    ):
        raise ValueError(f"kinds are integers from 0 to {'K' if cells is None else cells} - 1")
    cells = int(kinds.max()) + 1 if cells is None else cells
    present, of_row, counts = np.unique(kinds, return_inverse=True, return_counts=True)

    def spread(drawn: Floats) -> Floats:
        """(R, kinds present) -> (R,)"""
        found = []
        for start in range(0, len(drawn), batch := max(1, _CELLS // cells)):
            wide = np.zeros((len(drawn[start : start + batch]), cells))
            wide[:, present] = drawn[start : start + batch]
            found.append(np.asarray(statistic(wide), dtype=np.float64))
        return np.concatenate(found)

    point = float(spread(counts[None].astype(np.float64))[0])
    if not np.isfinite(point):
        raise ValueError("the statistic of all rows is not defined")
    if clusters is None:
        carriers = counts
        found = np.concatenate([spread(weights) for weights in draws(counts)])
    else:
        names, of_cluster = np.unique(clusters, return_inverse=True)
        cell = of_cluster * len(present) + of_row
        units = (
            np.bincount(cell, minlength=len(names) * len(present))
            .reshape(len(names), -1)
            .astype(np.float64)
        )
        carriers = (units > 0).sum(axis=0)
        found = spread(resampled_sums(units))
    found = found[np.isfinite(found)]
    if len(found) and np.ptp(found) > 1e-12:
        return percentiles(found)
    return _with_exceptions(point, counts, present, carriers, cells, statistic)


def _with_exceptions(
    point: float,
    counts: NDArray[np.int64],
    present: NDArray[np.int64],
    carriers: NDArray[np.int64],
    cells: int,
    statistic: Callable[[Floats], Floats],
) -> tuple[float, float]:
    """The range of the statistic when, for one kind at a time, a share ``room`` of its rows is of another kind."""
    low = high = point
    whole = np.zeros(cells)
    whole[present] = counts
    for kind, count, share in zip(present, counts, room(carriers), strict=True):
        for start in range(0, cells, batch := max(1, _CELLS // cells)):
            others = np.arange(start, min(cells, start + batch))
            moved = np.tile(whole, (len(others), 1))
            moved[:, kind] -= share * count
            moved[np.arange(len(others)), others] += share * count
            found = np.asarray(statistic(moved), dtype=np.float64)
            found = found[np.isfinite(found)]
            low, high = min(low, found.min(initial=low)), max(high, found.max(initial=high))
    return float(low), float(high)


def difference(a: Scores, b: Scores, clusters: Clusters = None) -> Difference:
    """Compare two systems on the same rows; with clusters, whole ones are resampled and flipped.

    p: exact McNemar (McNemar, 1947) where every row is right or wrong and there are no clusters. Otherwise, for means over
    seeds, graded scores and clusters, the sign-flip test (signs.py): "sign-flip permutation" where its p value is exact,
    "approximate randomisation" where it is drawn. ci95: the paired bootstrap. Raises ValueError where the rows differ in
    number, for no row, NaN, or clusters of other rows.
    """
    first, second = checked(a, clusters), checked(b)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} rows against {len(second)}")
    gaps = paired(first, second)
    wins, losses = int((gaps > 0).sum()), int((gaps < 0).sum())
    units = _sums_and_sizes(gaps, clusters)
    if clusters is None and _right_or_wrong(first) and _right_or_wrong(second):
        p, test = _mcnemar(wins, losses), "mcnemar-exact"
    else:
        p, exact = flip_test(units[:, 0])
        test = "sign-flip permutation" if exact else "approximate randomisation"
        test += " over clusters" if clusters is not None else ""
    return Difference(
        delta=float(gaps.mean()),
        ci95=mean_interval(gaps, clusters, lowest=-1.0),
        p=p,
        test=test,
        wins=wins,
        losses=losses,
        minimum_detectable_effect=minimum_detectable_effect(units[:, 0], units[:, 1]),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p values, in the given order."""
    if not p_values:
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]]


def _mcnemar(wins: int, losses: int) -> float:
    from scipy.stats import binomtest

    if wins + losses == 0:
        return 1.0
    return float(binomtest(wins, wins + losses, 0.5).pvalue)


def _right_or_wrong(values: Floats) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _sums_and_sizes(values: Floats, clusters: Clusters) -> Floats:
    """(units, 2): a unit's summed values and its rows."""
    return unit_sums(np.stack([values, np.ones(len(values))], axis=1), clusters)
