"""The statistics' promises on simulated test sets: false positives, coverage and power.

A check of few test sets runs always, one of 400 in the slow tests. Both allow what 99% of
binomial draws of so many trials give.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from dsbs.evaluation.bootstrap import Clusters, accuracy, label_efficiency
from dsbs.evaluation.significance import paired_difference

Floats = NDArray[np.float64]
Drawn = tuple[Floats, Floats, Floats, int, Clusters]  # a, b, a worse system, seeds, clusters

FEW = 60
MANY = pytest.param(400, marks=pytest.mark.slow)

# Beta distribution of how often rows are answered right: equal systems differ in a quarter of rows.
EASY = (3.0, 0.8)
TRUE_ACCURACY = EASY[0] / sum(EASY)
WORSE = 0.95  # the worse system is right so many times as often


def within_99_percent(hits: int, trials: int, probability: float) -> bool:
    low, high = binom.interval(0.99, trials, probability)
    return bool(low <= hits <= high)


def over_seeds(seeds: int) -> Callable[[np.random.Generator], Drawn]:
    def draw(rng: np.random.Generator) -> Drawn:
        chance = rng.beta(*EASY, 1000)
        a, b, worse = (
            (rng.random((seeds, 1000)) < share).mean(axis=0)
            for share in (chance, chance, WORSE * chance)
        )
        return a, b, worse, seeds, None

    return draw


def graded(rng: np.random.Generator) -> Drawn:
    """Scores without ties, as of ROUGE."""
    chance = rng.beta(*EASY, 200)
    a, b, worse = (
        rng.beta(4 * share + 1e-3, 4 * (1 - share) + 1e-3)
        for share in (chance, chance, WORSE * chance)
    )
    return a, b, worse, 2, None


def clustered(rng: np.random.Generator) -> Drawn:
    """300 clusters of 2 to 5 rows; four rows in five have the answer of their cluster."""
    sizes = rng.integers(2, 6, 300)
    clusters = np.repeat(np.arange(300), sizes)
    chance = rng.beta(*EASY, 300)
    systems = []
    for share in (chance, chance, WORSE * chance):
        of_cluster = (rng.random(300) < share)[clusters]
        of_row = rng.random(len(clusters)) < share[clusters]
        systems.append(np.where(rng.random(len(clusters)) < 0.8, of_cluster, of_row).astype(float))
    return systems[0], systems[1], systems[2], 1, clusters


@pytest.mark.parametrize("trials", [FEW, MANY])
@pytest.mark.parametrize(
    "draw",
    [over_seeds(1), over_seeds(3), graded, clustered],
    ids=["one seed", "three seeds", "graded", "clusters"],
)
def test_false_positives_and_coverage_are_as_promised(
    draw: Callable[[np.random.Generator], Drawn], trials: int
) -> None:
    """Exact tests are conservative as they are discrete: with about 260 rows that differ,
    McNemar's true level is 0.04 to 0.05."""
    rng = np.random.default_rng(1)
    positives = covers_accuracy = covers_zero = covers_difference = 0
    for _ in range(trials):
        a, b, worse, seeds, clusters = draw(rng)
        low, high = accuracy(a, seeds, clusters).ci95
        covers_accuracy += low <= TRUE_ACCURACY <= high
        equal = paired_difference(a, b, clusters)
        positives += equal.p <= 0.05
        covers_zero += equal.ci95[0] <= 0 <= equal.ci95[1]
        low, high = paired_difference(a, worse, clusters).ci95
        covers_difference += low <= TRUE_ACCURACY * (1 - WORSE) <= high
    assert within_99_percent(positives, trials, 0.05), positives
    assert within_99_percent(covers_accuracy, trials, 0.95), covers_accuracy
    assert within_99_percent(covers_zero, trials, 0.95), covers_zero
    assert within_99_percent(covers_difference, trials, 0.95), covers_difference


@pytest.mark.slow
def test_clustered_rows_need_their_clusters() -> None:
    """Taken as independent rows, the same data give intervals that are too narrow, and
    differences that do not exist."""
    trials = 400
    rng = np.random.default_rng(2)
    covers_accuracy = covers_zero = positives = 0
    for _ in range(trials):
        a, b, _, seeds, _ = clustered(rng)
        low, high = accuracy(a, seeds).ci95
        covers_accuracy += low <= TRUE_ACCURACY <= high
        equal = paired_difference(a, b)
        covers_zero += equal.ci95[0] <= 0 <= equal.ci95[1]
        positives += equal.p <= 0.05
    assert covers_accuracy < binom.ppf(0.005, trials, 0.95)
    assert covers_zero < binom.ppf(0.005, trials, 0.95)
    assert positives > binom.ppf(0.995, trials, 0.05)


@pytest.mark.parametrize("trials", [FEW, MANY])
def test_the_minimum_detectable_effect_is_detected_four_times_in_five(trials: int) -> None:
    rng = np.random.default_rng(3)
    rows = 1000
    discordant = 0.25
    first = np.array([1.0, 0.0, 1.0])
    second = np.array([0.0, 1.0, 1.0])
    counts = (125, 125, 750)
    effect = paired_difference(
        np.repeat(first, counts), np.repeat(second, counts)
    ).minimum_detectable_effect
    assert effect is not None
    shares = ((discordant + effect) / 2, (discordant - effect) / 2, 1 - discordant)
    detected = 0
    for _ in range(trials):
        drawn = rng.multinomial(rows, shares)
        detected += paired_difference(np.repeat(first, drawn), np.repeat(second, drawn)).p <= 0.05
    assert within_99_percent(detected, trials, 0.8), detected


@pytest.mark.parametrize("trials", [FEW, MANY])
def test_the_interval_of_label_efficiency_covers_the_truth(trials: int) -> None:
    """Accuracies of 0.60, 0.70 and 0.78 at 100, 400 and 1,600 rows: 0.74 is reached at 800."""
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(trials):
        shared = np.tile(rng.random(1000), (4, 1))  # half of the time, a row is hard for all
        difficulty = np.where(rng.random((4, 1000)) < 0.5, shared, rng.random((4, 1000)))
        scores = [
            (row < share).astype(float)
            for row, share in zip(difficulty, (0.60, 0.70, 0.78, 0.74), strict=True)
        ]
        curve = list(zip((100, 400, 1600), scores[:3], strict=True))
        low, high = label_efficiency(curve, scores[3])[1]
        covered += low is not None and low <= 800 and (high is None or high >= 800)
    assert within_99_percent(covered, trials, 0.95), covered
