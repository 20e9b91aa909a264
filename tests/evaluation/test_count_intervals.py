"""Intervals of numbers that follow from counts: macro-F1, recall, calibration error."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from dsbs.evaluation.bootstrap import RESAMPLES, counts_interval, mean_interval, resampled_counts

Floats = NDArray[np.float64]
LABELS = 3


def macro_f1(counts: Floats) -> Floats:
    """(R, 9) counts of gold x predicted -> (R,)"""
    table = counts.reshape(-1, LABELS, LABELS)
    hits = np.einsum("rii->ri", table)
    with np.errstate(invalid="ignore"):
        return (2 * hits / (table.sum(axis=1) + table.sum(axis=2))).mean(axis=1)


def recall(counts: Floats) -> Floats:
    """(R, 3) counts of other, wrong, right -> (R,)"""
    with np.errstate(invalid="ignore"):
        return counts[:, 2] / (counts[:, 1] + counts[:, 2])


def predictions(rows: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    gold = rng.choice(LABELS, rows, p=(0.6, 0.3, 0.1))
    return gold, np.where(rng.random(rows) < 0.7, gold, rng.integers(0, LABELS, rows))


def test_resamples_have_the_mean_and_the_covariance_of_the_multinomial() -> None:
    counts = np.array(
        [500, 300, 40, 20, 1, 1, 1, 9]
    )  # both sides of what is drawn at once and one by one
    n, shares = counts.sum(), counts / counts.sum()
    drawn = np.concatenate(list(resampled_counts(counts)))
    assert drawn.shape == (RESAMPLES, 8)
    assert (drawn.sum(axis=1) == n).all() and (drawn >= 0).all()
    spread = n * (np.diag(shares) - np.outer(shares, shares))
    error = np.sqrt(np.diag(spread) / RESAMPLES)
    assert (np.abs(drawn.mean(axis=0) - counts) < 4 * error).all()
    scale = np.sqrt(np.outer(np.diag(spread), np.diag(spread)))
    assert np.abs((np.cov(drawn.T) - spread) / scale).max() < 0.07


def test_a_share_by_counts_has_the_interval_of_a_mean() -> None:
    kinds = np.repeat([0, 1], (300, 700))
    assert counts_interval(kinds, lambda c: c[:, 1] / c.sum(axis=1)) == mean_interval(
        kinds.astype(float)
    )


@pytest.mark.parametrize("size", [1, 4])
def test_macro_f1_agrees_with_drawing_rows(size: int) -> None:
    gold, predicted = predictions(400, 1)
    clusters = np.arange(400) // size
    rng = np.random.default_rng(2)
    result = []
    for _ in range(1_500):
        rows = (rng.integers(0, 400 // size, 400 // size)[:, None] * size + np.arange(size)).ravel()
        hits = [2 * ((gold[rows] == k) & (predicted[rows] == k)).sum() for k in range(LABELS)]
        result.append(
            np.mean(
                [
                    hit / ((gold[rows] == k).sum() + (predicted[rows] == k).sum())
                    for k, hit in enumerate(hits)
                ]
            )
        )
    low, high = np.quantile(result, (0.025, 0.975))
    kinds = gold * LABELS + predicted
    ends = counts_interval(kinds, macro_f1, None if size == 1 else clusters, num_kinds=9)
    assert ends == pytest.approx((low, high), abs=0.1 * (high - low))


def test_the_order_of_rows_and_the_names_of_clusters_do_not_matter() -> None:
    gold, predicted = predictions(300, 3)
    kinds, clusters = gold * LABELS + predicted, np.arange(300) // 3
    order = np.random.default_rng(4).permutation(300)
    assert counts_interval(kinds[order], macro_f1) == counts_interval(kinds, macro_f1)
    assert counts_interval(kinds[order], macro_f1, 500 - clusters[order]) == counts_interval(
        kinds, macro_f1, clusters
    )


def test_clusters_of_equal_rows_widen_the_interval() -> None:
    gold, predicted = predictions(200, 5)
    kinds = gold * LABELS + predicted
    once = counts_interval(kinds, macro_f1)
    often = counts_interval(kinds.repeat(4), macro_f1, np.repeat(np.arange(200), 4))
    assert often == pytest.approx(once, abs=0.02)


def test_a_kind_that_no_row_has_still_has_its_column() -> None:
    widths = []

    def watch(counts: Floats) -> Floats:
        widths.append(counts.shape[1])
        return counts[:, 0] / counts.sum(axis=1)

    counts_interval(np.array([0, 2, 0, 2]), watch, num_kinds=5)
    assert set(widths) == {5}


def test_many_kinds_in_small_clusters_agree_with_few() -> None:
    rng = np.random.default_rng(6)
    kinds, clusters = rng.integers(0, 50, 600), np.arange(600) // 3
    many = counts_interval(kinds, lambda c: c[:, :20].sum(axis=1) / c.sum(axis=1), clusters)
    assert many == pytest.approx(mean_interval((kinds < 20).astype(float), clusters), abs=0.004)


def test_the_recall_of_a_few_rows_that_are_all_right_is_not_certain() -> None:
    low, high = counts_interval(np.repeat([0, 2], (997, 3)), recall)
    assert high == 1.0
    assert low == pytest.approx(0.025 ** (1 / 3), abs=1e-9)  # 3 of 3, Clopper and Pearson, 1934


def test_the_recall_of_a_class_with_one_row_leaves_out_resamples_without_it() -> None:
    low, high = counts_interval(np.repeat([0, 1], (50, 1)), recall, num_kinds=3)
    assert low == 0.0 and high == pytest.approx(0.975)


def test_a_cluster_of_right_rows_counts_as_one() -> None:
    kinds, clusters = np.repeat([0, 2], (90, 10)), np.repeat(np.arange(10), 10)
    low, _ = counts_interval(kinds, recall, clusters)
    assert low == pytest.approx(0.025, abs=1e-9)


@pytest.mark.parametrize("kinds", [np.array([-1, 0]), np.array([0, 3]), np.array([0.5, 1.0])])
def test_kinds_out_of_range_are_refused(kinds: NDArray[np.int64]) -> None:
    with pytest.raises(ValueError, match="integers from 0 to 3 - 1"):
        counts_interval(kinds, recall, num_kinds=3)


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        counts_interval(np.array([], dtype=np.int64), recall)
    with pytest.raises(ValueError, match="2 rows against clusters"):
        counts_interval(np.array([1, 2]), recall, np.array([0]))
    with pytest.raises(ValueError, match="not defined"):
        counts_interval(np.zeros(5, dtype=np.int64), recall, num_kinds=3)
