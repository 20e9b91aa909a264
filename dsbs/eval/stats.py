"""Intervals and tests, from scipy and statsmodels. Rows are the units; seeds are averaged within a row first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbs.intervals import wilson

RESAMPLES = 9_999
_SEED = 20230503

Scores = NDArray[np.float64]  # (rows,) in [0, 1]: a row's correctness, averaged over seeds


@dataclass(frozen=True, slots=True)
class Accuracy:
    """An accuracy with its 95 % interval and the interval's name."""

    value: float
    ci95: tuple[float, float]
    interval: str


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference of accuracies (points as fractions), its 95 % interval and a two-sided p value."""

    delta: float
    ci95: tuple[float, float]
    p: float
    test: str


def accuracy(scores: Scores, seeds: int) -> Accuracy:
    """One seed: Wilson's interval. Several: a percentile bootstrap over rows (a seed mean is no count of successes)."""
    mean = float(scores.mean())
    if seeds == 1:
        rate = wilson(round(float(scores.sum())), len(scores))
        assert rate is not None
        return Accuracy(mean, rate.ci95, "wilson")
    return Accuracy(mean, _bootstrap(scores, 0.0), "bootstrap over rows")


def difference(a: Scores, b: Scores) -> Difference:
    """Compare two systems on the same rows. Raises ValueError where the rows differ in number.

    Exact McNemar (McNemar, 1947) where every row is right or wrong; where rows hold means over seeds, the sign-flip
    permutation test of their differences, of which McNemar's is the case of one seed.
    """
    from scipy import stats

    if len(a) != len(b):
        raise ValueError(f"{len(a)} rows against {len(b)}")
    gaps = a - b
    delta = float(gaps.mean())
    apart = gaps[gaps != 0]
    interval = _bootstrap(gaps, -1.0)
    if len(apart) < 2:  # one row more or less is as likely either way
        return Difference(delta, interval, 1.0, "mcnemar-exact")
    if np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all():
        p = stats.binomtest(int((apart > 0).sum()), len(apart), 0.5).pvalue
        return Difference(delta, interval, float(p), "mcnemar-exact")

    def mean(x: Any, axis: int) -> Any:
        return np.mean(x, axis=axis)

    flipped = stats.permutation_test(
        (apart,),
        mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=500,
        rng=np.random.default_rng(_SEED),
        vectorized=True,
    )
    return Difference(delta, interval, float(flipped.pvalue), "sign-flip permutation")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p values, in the given order."""
    if not p_values:
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]]


def _bootstrap(values: Scores, lowest: float) -> tuple[float, float]:
    """Percentile bootstrap of the mean over rows, none below ``lowest``; seeded: the same rows give the same interval."""
    from scipy import stats

    if (values == values[0]).all():
        # resampling equal rows shows no spread; n rows without one exception still leave room for 1 - 0.025^(1/n) of them
        room = 1 - 0.025 ** (1 / len(values))
        return max(lowest, float(values[0]) - room), min(1.0, float(values[0]) + room)
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=200,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(found.low), float(found.high)
