"""Label efficiency: the training rows that a method needs, on curves made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from dsbs.evaluation.bootstrap import label_efficiency

Floats = NDArray[np.float64]


def scores(right: int, rows: int = 1000) -> Floats:
    return np.repeat([1.0, 0.0], (right, rows - right))


def mixed(share: float, seed: int, rows: int = 1000) -> Floats:
    return (np.random.default_rng(seed).random(rows) < share).astype(float)


def test_half_way_in_accuracy_is_half_way_in_log_rows() -> None:
    result, (low, high) = label_efficiency([(100, scores(500)), (1000, scores(700))], scores(600))
    assert result == math.ceil(math.sqrt(100 * 1000))
    assert low is not None and high is not None and low < result < high


def test_the_first_crossing_counts_in_whatever_order_the_points_come() -> None:
    curve = [
        (1000, scores(650)),
        (100, scores(500)),
        (400, scores(610)),
        (2000, scores(590)),
        (4000, scores(800)),
    ]
    expected = math.exp(np.interp(0.6, [0.5, 0.61], np.log([100, 400])))
    assert label_efficiency(curve, scores(600))[0] == math.ceil(expected)


def test_a_point_as_accurate_as_the_target_is_enough() -> None:
    assert (
        label_efficiency(
            [(100, scores(500)), (1000, scores(700)), (3000, scores(900))], scores(700)
        )[0]
        == 1000
    )


def test_a_target_below_the_first_point_needs_at_most_its_rows() -> None:
    assert label_efficiency([(100, scores(700)), (1000, scores(800))], scores(400)) == (
        100,
        (100, 100),
    )


def test_a_target_out_of_reach_needs_no_number() -> None:
    assert label_efficiency([(100, scores(300)), (1000, scores(400))], scores(900)) == (
        None,
        (None, None),
    )


def test_a_target_just_in_reach_has_an_open_interval() -> None:
    result, (low, high) = label_efficiency(
        [(100, mixed(0.4, 1)), (1000, mixed(0.61, 2))], mixed(0.6, 3)
    )
    assert result is not None and low is not None and 100 < low < result <= 1000
    assert high is None


def test_one_point_is_reached_or_not() -> None:
    assert label_efficiency([(50, scores(700))], scores(600))[0] == 50
    assert label_efficiency([(50, scores(500))], scores(600))[0] is None


def test_curve_and_target_are_drawn_together() -> None:
    """Systems that are right on nested rows always differ in one direction; resampled separately,
    their accuracies would overlap."""
    apart = label_efficiency([(100, scores(500)), (1000, scores(505))], np.roll(scores(503), 500))[
        1
    ]
    together = label_efficiency([(100, scores(500)), (1000, scores(505))], scores(503))[1]
    assert apart == (100, None)
    assert together[0] is not None and together[0] >= 100 and together[1] is not None


def test_the_interval_is_that_of_drawing_rows() -> None:
    curve = [(100, mixed(0.5, 4, 500)), (1000, mixed(0.7, 5, 500))]
    target = np.random.default_rng(6).choice([0.0, 1 / 3, 2 / 3, 1.0], 500, p=(0.3, 0.1, 0.1, 0.5))
    rng = np.random.default_rng(7)
    result = []
    for _ in range(4_000):
        rows = rng.integers(0, 500, 500)
        low, high, mean_target = (
            curve[0][1][rows].mean(),
            curve[1][1][rows].mean(),
            target[rows].mean(),
        )
        share = (mean_target - low) / (high - low)
        result.append(math.inf if share > 1 else math.log(100) + max(0.0, share) * math.log(10))
    expected = np.exp(np.quantile(result, (0.025, 0.975), method="inverted_cdf"))
    ends = label_efficiency(curve, target)[1]
    assert np.log(np.array(ends, dtype=float)) == pytest.approx(np.log(expected), abs=0.05)


def test_repeated_rows_in_clusters_leave_the_interval_as_it_is() -> None:
    curve = [(100, mixed(0.5, 8, 400)), (1000, mixed(0.8, 9, 400))]
    target = mixed(0.6, 10, 400)
    result, once = label_efficiency(curve, target)
    again, often = label_efficiency(
        [(n, s.repeat(3)) for n, s in curve], target.repeat(3), np.repeat(np.arange(400), 3)
    )
    assert again == result
    assert np.log(np.array(often, dtype=float)) == pytest.approx(
        np.log(np.array(once, dtype=float)), abs=0.05
    )


def test_the_order_of_rows_does_not_matter() -> None:
    curve, target = [(100, mixed(0.5, 11)), (1000, mixed(0.7, 12))], mixed(0.6, 13)
    order = np.random.default_rng(14).permutation(1000)
    assert label_efficiency([(n, s[order]) for n, s in curve], target[order]) == label_efficiency(
        curve, target
    )
    clusters = np.arange(1000) // 4
    assert label_efficiency(
        [(n, s[order]) for n, s in curve], target[order], -clusters[order]
    ) == label_efficiency(curve, target, clusters)


def test_one_row_or_one_cluster_leaves_all_open() -> None:
    curve, target = [(100, np.array([0.0])), (1000, np.array([1.0]))], np.array([0.5])
    assert label_efficiency(curve, target) == (317, (100, None))
    rows = [(100, scores(500)), (1000, scores(700))]
    assert label_efficiency(rows, scores(600), np.zeros(1000, dtype=np.int64)) == (317, (100, None))


def test_an_invalid_curve_is_refused() -> None:
    with pytest.raises(ValueError, match="one point or more"):
        label_efficiency([], scores(500))
    with pytest.raises(ValueError, match="at least one training row"):
        label_efficiency([(0, scores(500))], scores(500))
    with pytest.raises(ValueError, match="10 test rows at 100 training rows against 1000"):
        label_efficiency([(100, scores(5, 10))], scores(500))
    with pytest.raises(ValueError, match="row 0 "):
        label_efficiency([(100, np.array([np.nan, 1.0]))], np.ones(2))
