"""Intervals and tests against scipy, statsmodels and published examples."""

from __future__ import annotations

from itertools import product
from math import comb

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, binomtest, permutation_test
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

from dsbs.evaluation.bootstrap import accuracy, mean_interval
from dsbs.evaluation.significance import holm, paired_difference
from dsbs.formatting import rate
from dsbs.records.measures import wilson

Floats = NDArray[np.float64]


def right_or_wrong(rows: int, share: float, seed: int) -> Floats:
    return (np.random.default_rng(seed).random(rows) < share).astype(float)


def seed_means(rows: int, share: float, seed: int, seeds: int = 3) -> Floats:
    return (np.random.default_rng(seed).random((seeds, rows)) < share).mean(axis=0)


def pairs(both: int, first: int, second: int, neither: int) -> tuple[Floats, Floats]:
    """Scores of two systems: rows right in both, only in the first, only in the second, in none."""
    counts = (both, first, second, neither)
    return np.repeat([1.0, 1.0, 0.0, 0.0], counts), np.repeat([1.0, 0.0, 1.0, 0.0], counts)


# published examples


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_on_newcombes_examples(correct: int, n: int, low: float, high: float) -> None:
    """Newcombe, 1998, Statistics in Medicine 17: 857-872, table I, method 3."""
    result = accuracy(np.repeat([1.0, 0.0], (correct, n - correct)), 1)
    assert result.interval == "wilson"
    assert result.ci95 == pytest.approx((low, high), abs=5e-5)
    assert result.ci95 == pytest.approx(proportion_confint(correct, n, method="wilson"), abs=1e-9)


def test_mcnemar_on_agrestis_approval_ratings() -> None:
    """Agresti, 1990, Categorical Data Analysis, p. 350: 1,600 people answered twice, 150 and 86
    changed their mind; the difference is 0.04 with the 95% interval (0.02, 0.06)."""
    result = paired_difference(*pairs(794, 150, 86, 570))
    exact = (
        2 * sum(comb(236, k) for k in range(87)) / 2**236
    )  # whole numbers, no library: 3.716e-05
    assert result.test == "mcnemar-exact"
    assert result.p == pytest.approx(exact, abs=1e-9, rel=1e-9)
    assert result.p == pytest.approx(mcnemar([[794, 150], [86, 570]], exact=True).pvalue, abs=1e-9)
    assert (result.delta, result.wins, result.losses) == (pytest.approx(0.04), 150, 86)
    assert result.ci95 == pytest.approx((0.02, 0.06), abs=0.005)


def test_sign_flips_on_fishers_test_of_darwins_plants() -> None:
    """Fisher, 1935, The Design of Experiments, section 21: of the 2^15 sums of Darwin's 15
    differences (eighths of an inch), 863 are 314 or more and as many are -314 or less."""
    eighths = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48], dtype=float)
    result = paired_difference(eighths, np.zeros(15))
    assert result.test == "sign-flip permutation"
    assert result.p == pytest.approx(2 * 863 / 2**15, abs=1e-12)


def test_holm_on_the_textbook_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


# the same numbers as the libraries


def test_wilson_agrees_with_statsmodels() -> None:
    for correct, n in ((0, 10), (3, 10), (155, 200), (7201, 9842)):
        rate = wilson(correct, n)
        assert rate is not None
        assert rate.ci95 == pytest.approx(proportion_confint(correct, n, method="wilson"), abs=1e-9)


def test_wilson_of_no_trials_is_none_and_shows_a_dash() -> None:
    assert wilson(0, 0) is None
    assert rate(None) == "–"


def test_holm_agrees_with_statsmodels_whatever_the_order() -> None:
    ps = np.random.default_rng(4).random(12) ** 3
    assert holm(list(ps)) == pytest.approx(list(multipletests(ps, method="holm")[1]), abs=1e-9)
    assert holm(list(ps[::-1])) == pytest.approx(holm(list(ps))[::-1], abs=1e-12)


def test_one_seed_is_compared_by_exact_mcnemar() -> None:
    a, b = right_or_wrong(300, 0.7, 0), right_or_wrong(300, 0.6, 1)
    table = [[((a == x) & (b == y)).sum() for y in (1, 0)] for x in (1, 0)]
    result = paired_difference(a, b)
    assert result.test == "mcnemar-exact"
    assert result.p == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-9)
    assert result.delta == pytest.approx(a.mean() - b.mean())
    assert result.ci95[0] < result.delta < result.ci95[1]
    assert (result.wins, result.losses) == (table[0][1], table[1][0])


@pytest.mark.parametrize("graded", [False, True])
def test_few_rows_have_the_p_value_of_all_sign_patterns(graded: bool) -> None:
    rng = np.random.default_rng(5)
    a, b = (rng.random((2, 12)), rng.integers(0, 4, (2, 12)) / 3)[not graded]
    everything = permutation_test(
        (a - b,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
    )
    result = paired_difference(a, b)
    assert result.test == "sign-flip permutation"
    assert result.p == pytest.approx(everything.pvalue, abs=1e-9)


def test_means_over_seeds_have_an_exact_p_value_where_patterns_are_too_many_to_list() -> None:
    a, b = seed_means(17, 0.8, 6), seed_means(17, 0.4, 7)
    gaps = a - b
    sums = np.array([np.dot(signs, gaps) for signs in product((-1, 1), repeat=17)])
    result = paired_difference(a, b)
    assert result.test == "sign-flip permutation"
    assert result.p == pytest.approx((np.abs(sums) >= abs(gaps.sum()) - 1e-9).mean(), abs=1e-12)


def test_graded_scores_are_compared_by_approximate_randomization() -> None:
    rng = np.random.default_rng(8)
    a = rng.random(400)
    b = np.clip(a + rng.normal(0.015, 0.2, 400), 0, 1)
    drawn = permutation_test(
        (a - b,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        batch=1000,
        rng=np.random.default_rng(9),
        vectorized=True,
    )
    result = paired_difference(a, b)
    assert result.test == "approximate randomization"
    assert result.p == pytest.approx(drawn.pvalue, abs=0.015)  # three standard errors of both draws
    assert 0.02 < result.p < 0.9


def test_sign_flips_of_rows_that_are_right_or_wrong_are_mcnemars_test() -> None:
    a, b = right_or_wrong(600, 0.7, 1), right_or_wrong(600, 0.65, 2)
    alone = np.random.default_rng(3).permutation(
        600
    )  # each row a cluster: signs are flipped, McNemar is not asked
    result = paired_difference(a, b, alone)
    assert result.test == "sign-flip permutation over clusters"
    assert result.p == pytest.approx(paired_difference(a, b).p, abs=1e-9)


def test_a_bootstrapped_rate_has_the_quantiles_of_the_binomial() -> None:
    scores = np.repeat([1.0, 0.0], (620, 380))
    low, high = mean_interval(scores)
    assert (low, high) == pytest.approx(
        binom.ppf((0.025, 0.975), 1000, 0.62) / 1000, abs=0.0011
    )  # a row, by chance


def test_a_bootstrapped_mean_of_distinct_numbers_agrees_with_drawing_rows() -> None:
    values = np.random.default_rng(10).gamma(2.0, 3.0, 800)
    rng = np.random.default_rng(11)
    drawn = np.quantile(values[rng.integers(0, 800, (9_999, 800))].mean(axis=1), (0.025, 0.975))
    result = mean_interval(values)
    assert result == pytest.approx(drawn, abs=0.05 * (drawn[1] - drawn[0]))


@pytest.mark.parametrize("clusters", [None, np.arange(250) // 2])
def test_the_detectable_difference_has_80_percent_power_by_statsmodels(
    clusters: NDArray[np.int64] | None,
) -> None:
    a, b = seed_means(250, 0.7, 12), seed_means(250, 0.6, 13)
    gaps = a - b if clusters is None else np.bincount(clusters, a - b)
    result = paired_difference(a, b, clusters).minimum_detectable_effect
    assert result is not None
    effect = result * 250 / len(gaps) / gaps.std(ddof=1)
    assert TTestPower().power(effect, len(gaps), 0.05) == pytest.approx(0.8, abs=2e-6)


@pytest.mark.parametrize(
    "rows", [6, 912, 1066, 1458, 20_000]
)  # at 1458 statsmodels' own solver finds the negative root
def test_the_detectable_difference_is_found_for_any_number_of_rows(rows: int) -> None:
    a, b = right_or_wrong(rows, 0.5, 22), np.zeros(rows)
    result = paired_difference(a, b).minimum_detectable_effect
    assert result is not None
    assert TTestPower().power(result / a.std(ddof=1), rows, 0.05) == pytest.approx(0.8, abs=2e-6)


# seeds, clusters, order


def test_seeds_do_not_multiply_the_rows() -> None:
    scores = right_or_wrong(100, 0.6, 2)
    assert accuracy(scores, 1).interval == "wilson"
    several = accuracy(scores, 5)  # five identical seeds know no more than one
    assert several.interval == "bootstrap over rows"
    width = several.ci95[1] - several.ci95[0]
    assert width == pytest.approx(
        accuracy(scores, 1).ci95[1] - accuracy(scores, 1).ci95[0], rel=0.1
    )


def test_a_graded_score_of_one_seed_is_no_count_of_successes() -> None:
    assert accuracy(np.array([0.5, 1.0, 0.0, 0.25]), 1).interval == "bootstrap over rows"


def test_rows_repeated_in_their_clusters_know_no_more_than_one_of_them() -> None:
    a, b = right_or_wrong(200, 0.7, 14), right_or_wrong(200, 0.6, 15)
    clusters = np.repeat(np.arange(200), 4)
    once, often = paired_difference(a, b), paired_difference(a.repeat(4), b.repeat(4), clusters)
    assert often.p == pytest.approx(once.p, abs=1e-9)
    assert often.ci95 == pytest.approx(once.ci95, abs=0.011)  # two rows of 200, by chance
    assert often.minimum_detectable_effect == pytest.approx(
        once.minimum_detectable_effect, rel=1e-6
    )
    assert accuracy(a.repeat(4), 1, clusters).interval == "bootstrap over clusters"
    assert mean_interval(a.repeat(4), clusters) == pytest.approx(mean_interval(a), abs=0.011)


def test_clusters_of_unequal_size_weigh_by_their_rows() -> None:
    scores, clusters = np.array([1.0] * 90 + [0.0] * 10), np.repeat([0, 1], (90, 10))
    low, high = mean_interval(scores, clusters)
    assert (low, high) == (0.0, 1.0)  # two clusters: both may be the same one
    assert accuracy(scores, 1, clusters).value == 0.9


@pytest.mark.parametrize("clustered", [False, True])
def test_neither_the_order_of_rows_nor_the_names_of_clusters_matter(clustered: bool) -> None:
    rng = np.random.default_rng(16)
    for a, b in (
        (seed_means(300, 0.7, 17), seed_means(300, 0.6, 18)),
        (rng.random(300), rng.random(300)),
    ):
        clusters = np.arange(300) // 3 if clustered else None
        order = rng.permutation(300)
        renamed = 1000 - 7 * clusters[order] if clusters is not None else None
        first, second = (
            paired_difference(a, b, clusters),
            paired_difference(a[order], b[order], renamed),
        )
        assert (first.ci95, first.p, first.wins) == (second.ci95, second.p, second.wins)
        assert first.minimum_detectable_effect == pytest.approx(
            second.minimum_detectable_effect, rel=1e-9
        )
        assert accuracy(a, 3, clusters).ci95 == accuracy(a[order], 3, renamed).ci95


def test_the_same_rows_give_the_same_numbers() -> None:
    rng = np.random.default_rng(19)
    a, b = rng.random(500), rng.random(500)
    assert paired_difference(a, b) == paired_difference(a, b)


# nothing, little, and what is refused


def test_equal_systems_differ_by_nothing() -> None:
    for a in (np.array([1.0, 0.0, 1.0]), np.array([1 / 3, 0.0, 1.0])):
        result = paired_difference(a, a)
        assert (
            result.delta,
            result.p,
            result.wins,
            result.losses,
            result.minimum_detectable_effect,
        ) == (
            0.0,
            1.0,
            0,
            0,
            None,
        )


def test_means_over_seeds_that_differ_by_rounding_do_not_differ() -> None:
    a, b = np.array([0.1 + 0.2, 1.0]), np.array([0.3, 0.5])
    assert a[0] != b[0]
    assert (paired_difference(a, b).wins, paired_difference(a, b).losses) == (1, 0)


def test_a_difference_of_eight_rows_all_one_way_has_the_binomial_p() -> None:
    assert paired_difference(*pairs(12, 8, 0, 0)).p == pytest.approx(binomtest(8, 8, 0.5).pvalue)


def test_one_row_of_difference_is_no_evidence_and_no_crash() -> None:
    result = paired_difference(np.array([1, 1, 1, 0.5]), np.array([1.0, 1, 1, 1]))
    assert (result.delta, result.p, result.losses) == (-0.125, 1.0, 1)


def test_one_row_or_one_cluster_is_next_to_no_evidence() -> None:
    result = paired_difference(np.array([0.5]), np.array([1.0]))
    assert (result.p, result.minimum_detectable_effect) == (1.0, None)
    assert result.ci95[0] < -0.95 and result.ci95[1] > 0.9
    rows, same = right_or_wrong(50, 0.5, 20), np.zeros(50, dtype=np.int64)
    low, high = accuracy(rows, 1, same).ci95
    assert low < 0.05 and high > 0.95
    single = paired_difference(rows, 1 - rows, same)
    assert (single.p, single.minimum_detectable_effect) == (1.0, None)
    assert single.ci95[1] - single.ci95[0] > 1.9


def test_rows_too_few_to_show_any_difference_name_none() -> None:
    assert (
        paired_difference(
            np.array([1.0, 0.0, 0.5]), np.array([0.0, 1.0, 0.5])
        ).minimum_detectable_effect
        is None
    )


def test_rows_without_a_spread_claim_no_certainty() -> None:
    low, high = accuracy(np.ones(20), 2).ci95
    assert high == 1.0 and low == pytest.approx(0.025 ** (1 / 20), abs=1e-9)
    assert (low, high) == pytest.approx(
        proportion_confint(20, 20, alpha=0.05, method="beta"), abs=1e-9
    )
    same = paired_difference(np.ones(20), np.ones(20))
    assert same.ci95[0] == pytest.approx(-same.ci95[1]) and same.ci95[1] > 0.1


def test_clusters_without_a_spread_have_the_interval_of_as_many_rows() -> None:
    assert mean_interval(np.ones(60), np.arange(60) // 3) == pytest.approx(
        mean_interval(np.ones(20))
    )


def test_graded_values_outside_0_to_1_have_an_interval() -> None:
    values = np.random.default_rng(21).normal(40, 5, 200)
    low, high = mean_interval(values)
    assert low < values.mean() < high and high - low < 2
    assert mean_interval(np.full(5, 12.0)) == (pytest.approx(12 * 0.025 ** (1 / 5)), 12.0)


def test_rows_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="3 rows against 2"):
        paired_difference(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match="3 rows against clusters"):
        paired_difference(np.ones(3), np.ones(3), np.zeros(2, dtype=np.int64))
    with pytest.raises(ValueError, match="3 rows against clusters"):
        accuracy(np.ones(3), 1, np.zeros(4, dtype=np.int64))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused_with_its_row(bad: float) -> None:
    losses = np.array([1.0, bad, 0.0])
    for attempt in (
        lambda: accuracy(losses, 1),
        lambda: mean_interval(losses),
        lambda: paired_difference(losses, np.ones(3)),
        lambda: paired_difference(np.ones(3), losses),
    ):
        with pytest.raises(ValueError, match="row 1 "):
            attempt()


def test_an_empty_test_set_is_refused() -> None:
    for attempt in (
        lambda: accuracy(np.array([]), 1),
        lambda: paired_difference(np.array([]), np.array([])),
    ):
        with pytest.raises(ValueError, match="at least one row"):
            attempt()
