"""Intervals and tests against scipy, statsmodels and a published example."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from dsbs.eval.stats import accuracy, difference, holm
from dsbs.intervals import percent, wilson


def test_wilson_agrees_with_statsmodels() -> None:
    for correct, n in ((0, 10), (3, 10), (155, 200), (7201, 9842)):
        rate = wilson(correct, n)
        assert rate is not None
        assert rate.ci95 == pytest.approx(proportion_confint(correct, n, method="wilson"), abs=1e-9)


def test_wilson_of_nothing_is_nothing_and_shows_a_dash() -> None:
    assert wilson(0, 0) is None
    assert percent(None) == "–"


def test_one_seed_is_compared_by_exact_mcnemar() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.random(300) < 0.7).astype(float), (rng.random(300) < 0.6).astype(float)
    table = [
        [((a == 1) & (b == 1)).sum(), ((a == 1) & (b == 0)).sum()],
        [((a == 0) & (b == 1)).sum(), ((a == 0) & (b == 0)).sum()],
    ]
    found = difference(a, b)
    assert found.test == "mcnemar-exact"
    assert found.p == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-9)
    assert found.delta == pytest.approx(a.mean() - b.mean())
    assert found.ci95[0] < found.delta < found.ci95[1]


def test_sign_flips_of_rows_that_are_right_or_wrong_agree_with_mcnemar() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.random(60) < 0.7).astype(float), (rng.random(60) < 0.5).astype(float)
    exact = difference(a, b).p
    a[0] = a[0] / 2 + 0.25  # one row between right and wrong sends the comparison the other way
    found = difference(a, b)
    assert found.test == "sign-flip permutation"
    assert found.p == pytest.approx(exact, abs=0.06)


def test_seeds_do_not_multiply_the_rows() -> None:
    rng = np.random.default_rng(2)
    one = (rng.random(100) < 0.6).astype(float)
    assert accuracy(one, 1).interval == "wilson"
    several = accuracy(one, 5)  # five identical seeds know no more than one
    width = several.ci95[1] - several.ci95[0]
    assert width == pytest.approx(accuracy(one, 1).ci95[1] - accuracy(one, 1).ci95[0], rel=0.1)


def test_equal_systems_differ_by_nothing() -> None:
    a = np.array([1.0, 0.0, 1.0])
    assert (difference(a, a).delta, difference(a, a).p) == (0.0, 1.0)


def test_rows_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="3 rows against 2"):
        difference(np.ones(3), np.ones(2))


def test_holm_on_the_textbook_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_a_difference_of_eight_rows_all_one_way_has_the_binomial_p() -> None:
    a, b = np.ones(20), np.concatenate([np.zeros(8), np.ones(12)])
    assert difference(a, b).p == pytest.approx(binomtest(8, 8, 0.5).pvalue)


def test_one_row_of_difference_is_no_evidence_and_no_crash() -> None:
    found = difference(np.array([1, 1, 1, 0.5]), np.array([1.0, 1, 1, 1]))
    assert (found.delta, found.p) == (-0.125, 1.0)
    assert difference(np.array([0.5]), np.array([1.0])).p == 1.0


def test_rows_without_a_spread_claim_no_certainty() -> None:
    low, high = accuracy(np.ones(20), 2).ci95
    assert high == 1.0 and low == pytest.approx(0.025 ** (1 / 20), abs=1e-9)
    same = difference(np.ones(20), np.ones(20))
    assert same.ci95[0] == pytest.approx(-same.ci95[1]) and same.ci95[1] > 0.1
