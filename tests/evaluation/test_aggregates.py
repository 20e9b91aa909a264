"""Paired tests of F1, kappa and correlations: exact p values, level, power and coverage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from dsbs.config import TaskSection
from dsbs.config.registry import METRICS, entry
from dsbs.evaluation.aggregates import RowSums, graded_difference, sums_difference
from dsbs.evaluation.bootstrap import Floats
from dsbs.evaluation.metrics import Scored, SystemPredictions, measure
from dsbs.evaluation.significance import permutation_test
from dsbs.records import Example, Prediction
from dsbs.tasks import Task, make_task

TAGS = make_task(TaskSection(name="multilabel", data={"train": "-"}, labels=["a", "b", "c"]))
SCALE = make_task(TaskSection(name="score", data={"train": "-"}, range=(1, 5)))
FEW, MANY = 60, pytest.param(500, marks=pytest.mark.slow)


def f1(sums: Floats) -> Floats:
    return np.asarray(2 * sums[:, 0] / (sums[:, 1] + sums[:, 2]))


def system(task: Task, gold: list[str], answers: list[list[str]]) -> SystemPredictions:
    rows = [Example(id=str(i), input={}, label=label) for i, label in enumerate(gold)]
    files = [
        Scored(
            rows,
            [Prediction(id=row.id, raw="-", made_by="test") for row in rows],
            list(seed),
            np.array([a == b for a, b in zip(seed, gold, strict=True)]),
        )
        for seed in answers
    ]
    return SystemPredictions(task, files)


def test_few_rows_have_the_p_value_of_all_exchanges() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 3, (2, 8, 3)).astype(float)
    ours[0] = theirs[0]  # a row without a difference
    result = sums_difference(RowSums.of(ours, f1), RowSums.of(theirs, f1))
    assert result is not None and result.test == "exact randomization" and result.n == 8
    differences = []
    for exchanged in itertools.product([False, True], repeat=8):
        mask = np.array(exchanged)[:, None]
        first, second = np.where(mask, theirs, ours), np.where(mask, ours, theirs)
        differences.append(float((f1(first.sum(0)[None]) - f1(second.sum(0)[None]))[0]))
    assert result.delta == pytest.approx(differences[0])
    at_least = np.abs(differences) >= abs(differences[0]) - 1e-12
    assert result.p == pytest.approx(np.mean(at_least))


def test_a_mean_has_the_p_value_of_sign_flips() -> None:
    rng = np.random.default_rng(1)
    values = rng.random((2, 12))
    sums = [
        RowSums.of(np.stack([each, np.ones(12)], 1), lambda s: s[:, 0] / s[:, 1]) for each in values
    ]
    result = sums_difference(*sums)
    p, is_exact = permutation_test(values[0] - values[1])
    assert result is not None and is_exact and result.p == pytest.approx(p)


def test_equal_systems_do_not_differ_and_the_interval_allows_for_exceptions() -> None:
    sums = RowSums.of(np.tile([1.0, 1.0, 1.0], (40, 1)), f1)
    result = sums_difference(sums, sums)
    assert result is not None and result.delta == 0 and result.p == 1
    assert result.ci95[0] < 0 < result.ci95[1]


def test_an_undefined_measure_is_not_compared() -> None:
    nothing = RowSums.of(np.zeros((5, 3)), f1)
    assert sums_difference(nothing, RowSums.of(np.ones((5, 3)), f1)) is None


def test_the_order_of_rows_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    ours, theirs = rng.integers(0, 3, (2, 60, 3)).astype(float)
    order = rng.permutation(60)
    once = sums_difference(RowSums.of(ours, f1), RowSums.of(theirs, f1))
    again = sums_difference(RowSums.of(ours[order], f1), RowSums.of(theirs[order], f1))
    assert once == again


def test_repeated_rows_in_clusters_know_no_more_than_one_of_them() -> None:
    rng = np.random.default_rng(3)
    ours, theirs = rng.integers(0, 3, (2, 40, 3)).astype(float)
    alone = sums_difference(RowSums.of(ours, f1), RowSums.of(theirs, f1))
    clusters = np.repeat(np.arange(40), 5)
    repeated = sums_difference(
        RowSums.of(np.repeat(ours, 5, axis=0), f1),
        RowSums.of(np.repeat(theirs, 5, axis=0), f1),
        clusters,
    )
    assert alone is not None and repeated is not None
    assert repeated.delta == pytest.approx(alone.delta)
    assert repeated.p == pytest.approx(alone.p, abs=0.03)
    assert repeated.test == "approximate randomization over clusters"


# --- level, power and coverage by simulation


def tag_systems(rng: np.random.Generator, seeds: int, worse: float) -> list[SystemPredictions]:
    """Over 80 rows of different difficulty; the second errs ``worse`` times as often."""
    truth = rng.random((80, 3)) < [0.5, 0.3, 0.1]
    chance = rng.beta(2, 8, (80, 1))
    systems = []
    for factor in (1.0, worse):
        wrong = rng.random((seeds, 80, 3)) < factor * chance
        guess = truth ^ wrong
        written = [[_tags(row) for row in seed] for seed in guess]
        systems.append(system(TAGS, [_tags(row) for row in truth], written))
    return systems


def _tags(row: NDArray[np.bool_]) -> str:
    return TAGS.label_of_parts(
        {name: name if has else None for name, has in zip("abc", row, strict=True)}
    )


def score_systems(rng: np.random.Generator, seeds: int, worse: float) -> list[SystemPredictions]:
    truth = rng.integers(1, 6, 80)
    spread = rng.gamma(2, 0.4, 80)
    systems = []
    for factor in (1.0, worse):
        noise = rng.normal(0, factor * spread, (seeds, 80))
        guess = np.clip(np.rint(truth + noise), 1, 5).astype(int)
        systems.append(system(SCALE, [*map(str, truth)], [[*map(str, seed)] for seed in guess]))
    return systems


DRAWS = {
    "micro_f1": tag_systems,
    "macro_f1": tag_systems,
    "hamming": tag_systems,
    "quadratic_kappa": score_systems,
    "spearman": score_systems,
    "mae": score_systems,
    "within_one": score_systems,
}


def _compared(metric: str, predictions: SystemPredictions) -> RowSums | Floats:
    record = entry(METRICS, metric)
    values = None if record.row_values is None else record.row_values(predictions)
    result = record.sums(predictions) if values is None else values
    assert result is not None
    return result


@pytest.mark.parametrize("trials", [FEW, MANY])
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("metric", DRAWS)
def test_the_paired_tests_hold_their_level(metric: str, seeds: int, trials: int) -> None:
    """At most the upper 99.9% limit of 5% false positives; a worse system is found more often."""
    from scipy.stats import binom

    rng = np.random.default_rng(len(metric) + seeds)
    positives = found = covered = 0
    for trial in range(trials):
        first, second = (_compared(metric, s) for s in DRAWS[metric](rng, seeds, 1.0))
        equal = graded_difference(first, second)
        assert equal is not None
        positives += equal.p <= 0.05
        covered += equal.ci95[0] <= 0 <= equal.ci95[1]
        if trial < 10:
            first, second = (_compared(metric, s) for s in DRAWS[metric](rng, seeds, 3.0))
            different = graded_difference(first, second)
            found += different is not None and different.p <= 0.05
    assert positives <= binom.ppf(0.999, trials, 0.05), positives
    # a percentile bootstrap of 80 rows covers somewhat less than 95%
    assert covered >= binom.ppf(0.001, trials, 0.92), covered
    assert found >= 8, found


def test_every_metric_that_compares_systems_is_measured_with_an_interval() -> None:
    rng = np.random.default_rng(5)
    for draw in (tag_systems, score_systems):
        measures = measure(draw(rng, 2, 1.0)[0])
        assert set(measures.compared) & set(DRAWS)
        for name in measures.compared:
            low, high = measures.metrics[name].ci95 or (1, 0)
            assert low <= measures.metrics[name].value <= high
