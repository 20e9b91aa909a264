"""How many training rows a method needs to be as accurate as another system, read off its curve."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dsbs.evaluation.bootstrap import (
    Clusters,
    Floats,
    Scores,
    checked,
    paired,
    resampled_sums,
    room,
    unit_sums,
)


def needed(
    curve: Sequence[tuple[int, Scores]], target: Scores, clusters: Clusters = None
) -> tuple[int | None, tuple[int | None, int | None]]:
    """The training rows at which the curve first reaches the target's accuracy, and their 95 % interval.

    ``curve``: training rows and scores of one method, in any order; ``target``: another system's scores, all on the same test
    rows. Between points accuracy is linear in log(training rows). A target below the first point needs at most that point's
    rows, which are returned; None: not reached within the rows tried. The interval is the percentile bootstrap over test rows
    (or clusters), drawn for curve and target together; a resample whose curve does not reach its target counts as more than any
    number. Raises ValueError where there is no point, a point has no training rows, or the test rows differ in number.
    """
    wanted = checked(target, clusters)
    points = sorted(((rows, checked(scores)) for rows, scores in curve), key=lambda point: point[0])
    if not points or points[0][0] < 1:
        raise ValueError("a curve has one point or more, each with at least one training row")
    for rows, scores in points:
        if len(scores) != len(wanted):
            raise ValueError(
                f"{len(scores)} test rows at {rows} training rows against {len(wanted)} of the target"
            )
    log_rows = np.log([rows for rows, _ in points])
    gaps = np.stack([paired(scores, wanted) for _, scores in points], axis=1)
    units = unit_sums(gaps, clusters)
    mean = gaps.mean(axis=0)
    found = _crossing(mean[None], log_rows)[0]
    means = units / _sizes(len(wanted), clusters)[:, None]
    if np.ptp(means, axis=0).max() < 1e-12:
        share = room(len(units))  # resampling equal units would show no spread
        ends = _crossing(np.stack([mean + share * (1 - mean), mean - share * (1 + mean)]), log_rows)
    else:
        # a curve crosses its target where the sums do, so the number of rows drawn makes no difference
        ends = np.quantile(
            _crossing(resampled_sums(units), log_rows), (0.025, 0.975), method="inverted_cdf"
        )
    return _rows(found), (_rows(ends[0]), _rows(ends[1]))


def _sizes(rows: int, clusters: Clusters) -> Floats:
    return unit_sums(np.ones((rows, 1)), clusters)[:, 0]


def _crossing(gaps: Floats, log_rows: Floats) -> Floats:
    """(R, points) gaps to the target -> (R,) log rows of the first crossing from below, infinity where there is none."""
    reached = gaps >= -1e-9  # sums of thirds that are zero but for rounding
    at = reached.argmax(axis=1)
    before = np.maximum(at - 1, 0)
    every = np.arange(len(gaps))
    low, high = gaps[every, before], gaps[every, at]
    rise = np.where(at > 0, high - low, 1.0)
    crossing = np.where(
        at > 0, log_rows[before] - (log_rows[at] - log_rows[before]) * low / rise, log_rows[0]
    )
    return np.where(reached.any(axis=1), np.minimum(crossing, log_rows[at]), np.inf)


def _rows(log_rows: float) -> int | None:
    """Whole rows that suffice; a millionth of a row is rounding."""
    return None if math.isinf(log_rows) else math.ceil(math.exp(log_rows) - 1e-6)
