"""Thresholds of a cascade: their guarantee in simulations, ties, few rows, and cross-fitting."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, binomtest

from dsbs.config import CascadeSection
from dsbs.evaluation.thresholds import (
    GRID,
    CascadeRows,
    accuracy_threshold,
    agreement_threshold,
    choose,
    fewest_rows,
    fit_and_test,
    margin_threshold,
    most_events,
    upper_bound,
)

Floats = NDArray[np.float64]

DRAWS = 2000
ROWS = 500
RISK = 0.05
LEVEL = 0.95
# The chance that a student with this confidence, uniform in [0, 1], answers otherwise.
CURVES: dict[str, Callable[[Floats], Floats]] = {
    "linear": lambda c: 0.5 * (1 - c),
    "confident errors": lambda c: np.full_like(c, 0.15),
    "cliff": lambda c: np.where(c > 0.6, 0.01, 0.6),
    "useless order": lambda c: 0.3 * c,
}


def draw(rng: np.random.Generator, curve: Callable[[Floats], Floats]) -> CascadeRows:
    confidence = rng.random(ROWS)
    agrees = rng.random(ROWS) >= curve(confidence)
    correct = rng.random(ROWS) < 0.8
    return CascadeRows(confidence, agrees, correct, rng.random(ROWS) < 0.8)


def true_risk(curve: Callable[[Floats], Floats], thresholds: Floats) -> Floats:
    """The share of requests answered otherwise, by numerical integration above each threshold."""
    grid = (np.arange(20_000) + 0.5) / 20_000
    tail = np.cumsum(curve(grid)[::-1])[::-1] / 20_000
    return np.append(tail, 0.0)[np.searchsorted(grid, thresholds)]


@pytest.mark.parametrize("name", CURVES)
def test_the_target_is_missed_as_rarely_as_promised(name: str) -> None:
    """In 2,000 draws of 500 calibration rows. The bound is exact, so the chance of a miss is that
    of the binomial distribution at the target, which is at most 5%."""
    rng = np.random.default_rng(16)
    curve = CURVES[name]
    thresholds = []
    for _ in range(DRAWS):
        rows = draw(rng, curve)
        choice = agreement_threshold(rows.confidence, ~rows.agrees, RISK, LEVEL)
        thresholds.append(1.0 if choice.threshold is None else choice.threshold)
    misses = int((true_risk(curve, np.array(thresholds)) > RISK).sum())
    chance = binom.cdf(most_events(ROWS, RISK, LEVEL), ROWS, RISK)
    low, high = binom.interval(0.99, DRAWS, chance)
    assert chance <= 1 - LEVEL
    assert low <= misses <= high
    assert misses <= binom.interval(0.99, DRAWS, 1 - LEVEL)[1]


@pytest.mark.parametrize("of", ["accuracy", "margin"])
def test_accuracy_is_missed_no_more_often_than_promised(of: str) -> None:
    """The student is right on a share that grows with its confidence, its teacher on 90%."""
    rng = np.random.default_rng(17)
    grid = (np.arange(20_000) + 0.5) / 20_000
    misses = 0
    for _ in range(DRAWS // 4):
        confidence = rng.random(ROWS)
        correct = rng.random(ROWS) < 0.5 + 0.5 * confidence
        teacher = rng.random(ROWS) < 0.9
        rows = CascadeRows(confidence, correct == teacher, correct, teacher)
        if of == "accuracy":
            threshold = accuracy_threshold(rows, 0.13, LEVEL).threshold
            worst = 0.87
        else:
            threshold = margin_threshold(rows, 0.05, LEVEL).threshold
            worst = 0.85
        if threshold is not None:
            realized = np.where(grid >= threshold, 0.5 + 0.5 * grid, 0.9).mean()
            misses += realized < worst
    assert misses <= binom.interval(0.99, DRAWS // 4, 1 - LEVEL)[1]


def test_thresholds_of_accuracy_agree_with_a_search() -> None:
    rng = np.random.default_rng(5)
    confidence = rng.random(400)
    correct = rng.random(400) < 0.6 + 0.4 * confidence
    teacher = rng.random(400) < 0.8
    rows = CascadeRows(confidence, correct, correct, teacher)
    holding = None
    for threshold in GRID.tolist():
        answered = rows.answered(threshold)
        lost = int((answered & teacher & ~correct).sum())
        won = int((answered & ~teacher & correct).sum())
        interval = binomtest(won, 400).proportion_ci(0.95)
        if upper_bound(lost, 400, 0.975) - interval.low > 0.04:
            break
        holding = threshold
    choice = margin_threshold(rows, 0.04, 0.95)
    assert holding is not None
    assert choice.threshold == holding
    loosest = accuracy_threshold(rows, 0.26, 0.95)
    assert loosest.bound is not None
    assert loosest.threshold is not None
    answered = rows.answered(loosest.threshold)
    wrong = int((~np.where(answered, correct, teacher)).sum())
    assert loosest.bound == pytest.approx(upper_bound(wrong, 400, 0.95))


def test_the_bound_is_scipys_exact_one() -> None:
    for events, n in ((0, 149), (3, 500), (10, 10)):
        expected = binomtest(events, n, alternative="less").proportion_ci(0.95).high
        assert upper_bound(events, n, 0.95) == pytest.approx(expected)
    for n in (10, 148, 149, 500, 5000):
        allowed = most_events(n, 0.02, 0.95)
        assert allowed < 0 or upper_bound(allowed, n, 0.95) <= 0.02
        assert upper_bound(allowed + 1, n, 0.95) > 0.02
    assert fewest_rows(CascadeSection(target=0.98)) == 149


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=80))
def test_rows_of_equal_confidence_are_on_one_side(pairs: list[tuple[int, bool]]) -> None:
    """The threshold is the loosest one that holds, found by trying every confidence."""
    confidence = np.array([value / 5 for value, _ in pairs])
    differs = np.array([is_different for _, is_different in pairs])
    choice = agreement_threshold(confidence, differs, 0.2, 0.9)
    holding = None
    for value in sorted(set(confidence.tolist()), reverse=True):
        events = int((differs & (confidence >= value)).sum())
        if upper_bound(events, len(pairs), 0.9) > 0.2:
            break
        holding = value
    if holding is None:
        assert choice.threshold is None
    else:
        assert choice.threshold is not None
        assert choice.bound is not None
        answered = confidence >= choice.threshold
        assert (answered == (confidence >= holding)).all()
        assert choice.bound == pytest.approx(
            upper_bound(int(differs[answered].sum()), len(pairs), 0.9)
        )


def test_without_a_threshold_the_rows_that_would_do_are_named() -> None:
    sure = np.ones(100)
    few = agreement_threshold(sure, np.zeros(100, bool), 0.02, 0.95)
    assert (few.threshold, few.rows_needed) == (None, 149)
    some = np.arange(400) < 4  # 1% of the only group
    more = agreement_threshold(np.ones(400), some, 0.02, 0.95)
    assert more.threshold is None
    assert more.rows_needed is not None
    assert upper_bound(round(more.rows_needed / 100), more.rows_needed, 0.95) <= 0.0205
    hopeless = agreement_threshold(np.ones(400), np.arange(400) < 12, 0.02, 0.95)
    assert (hopeless.threshold, hopeless.rows_needed) == (None, None)


def test_unreadable_answers_are_never_the_students() -> None:
    confidence = np.where(np.arange(300) < 100, -1.0, 0.9)
    rows = CascadeRows(confidence, confidence > 0, confidence > 0, np.ones(300, bool))
    choice = choose(rows, CascadeSection(target=0.98))
    assert choice.threshold == 0.0  # every readable answer, and less sure ones too
    assert rows.answered(choice.threshold).sum() == 200
    assert not rows.answered(None).any()


def test_few_rows_are_cross_fitted() -> None:
    """200 rows: half of them cannot show a risk of 2%, four fifths can."""
    rng = np.random.default_rng(3)
    confidence = rng.random(200)
    agrees = confidence > 0.1
    rows = CascadeRows(confidence, agrees, agrees, np.ones(200, bool))
    section = CascadeSection(target=0.98)
    few = fit_and_test(rows, rng.random(200), section, 0.5)
    assert few.folds == 5
    assert (few.rows, len(few.test)) == (200, 200)
    assert few.choice.threshold is not None
    assert not (few.answered & ~agrees).any()
    many = fit_and_test(rows, rng.random(200), CascadeSection(target=0.9), 0.5)
    assert many.folds is None
    assert many.rows + len(many.test) == 200
