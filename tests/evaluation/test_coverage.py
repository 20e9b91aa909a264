"""What the statistics promise, over 400 simulated test sets: false positives, coverage, power."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from dsbs.evaluation.bootstrap import Clusters, accuracy, label_efficiency
from dsbs.evaluation.significance import paired_difference

Floats = NDArray[np.float64]
TIMES = 400
DRAWN = tuple[Floats, Floats, Floats, int, Clusters]

EASY = (
    3.0,
    0.8,
)  # of the beta distribution of how often rows are answered right: a quarter of them differ between equal systems
TRUTH = EASY[0] / sum(EASY)
LESS = 0.95  # a worse system is right so many times as often


def within_99_percent(hits: int, probability: float) -> bool:
    low, high = binom.interval(0.99, TIMES, probability)
    return bool(low <= hits <= high)


def of_seeds(seeds: int) -> Callable[[np.random.Generator], DRAWN]:
    def draw(rng: np.random.Generator) -> DRAWN:
        chance = rng.beta(*EASY, 1000)
        a, b, worse = (
            (rng.random((seeds, 1000)) < part).mean(axis=0)
            for part in (chance, chance, LESS * chance)
        )
        return a, b, worse, seeds, None

    return draw


def graded(rng: np.random.Generator) -> DRAWN:
    """Scores without equal ones, as of ROUGE."""
    chance = rng.beta(*EASY, 200)
    a, b, worse = (
        rng.beta(4 * part + 1e-3, 4 * (1 - part) + 1e-3) for part in (chance, chance, LESS * chance)
    )
    return a, b, worse, 2, None


def alike(rng: np.random.Generator) -> DRAWN:
    """300 clusters of two to five rows, which four times in five have the answer of their cluster's first row."""
    sizes = rng.integers(2, 6, 300)
    clusters = np.repeat(np.arange(300), sizes)
    chance = rng.beta(*EASY, 300)
    systems = []
    for part in (chance, chance, LESS * chance):
        of_cluster = (rng.random(300) < part)[clusters]
        own = rng.random(len(clusters)) < part[clusters]
        systems.append(np.where(rng.random(len(clusters)) < 0.8, of_cluster, own).astype(float))
    return systems[0], systems[1], systems[2], 1, clusters


@pytest.mark.parametrize(
    "draw",
    [of_seeds(1), of_seeds(3), graded, alike],
    ids=["one seed", "three seeds", "graded", "clusters"],
)
def test_false_positives_and_coverage_are_as_promised(
    draw: Callable[[np.random.Generator], DRAWN],
) -> None:
    """The exact tests are conservative by their discreteness: with about 260 rows that differ, McNemar's true level is 0.04 to
    0.05, inside the interval of 400 trials (0.0225 to 0.08)."""
    rng = np.random.default_rng(1)
    positive = rate = null = real = 0
    for _ in range(TIMES):
        a, b, worse, seeds, clusters = draw(rng)
        result = accuracy(a, seeds, clusters)
        rate += result.ci95[0] <= TRUTH <= result.ci95[1]
        equal, gap = paired_difference(a, b, clusters), paired_difference(a, worse, clusters)
        positive += equal.p <= 0.05
        null += equal.ci95[0] <= 0 <= equal.ci95[1]
        real += gap.ci95[0] <= TRUTH * (1 - LESS) <= gap.ci95[1]
    assert within_99_percent(positive, 0.05), positive
    assert within_99_percent(rate, 0.95), rate
    assert within_99_percent(null, 0.95), null
    assert within_99_percent(real, 0.95), real


@pytest.mark.slow
def test_rows_that_belong_together_need_their_clusters() -> None:
    """Taken for single rows, the same data give intervals that are too narrow and differences that are not there."""
    rng = np.random.default_rng(2)
    rate = gap = positive = 0
    for _ in range(TIMES):
        a, b, _, seeds, _ = alike(rng)
        low, high = accuracy(a, seeds).ci95
        rate += low <= TRUTH <= high
        equal = paired_difference(a, b)
        gap += equal.ci95[0] <= 0 <= equal.ci95[1]
        positive += equal.p <= 0.05
    assert rate < binom.ppf(0.005, TIMES, 0.95)
    assert gap < binom.ppf(0.005, TIMES, 0.95)
    assert positive > binom.ppf(0.995, TIMES, 0.05)


def test_a_detectable_difference_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(3)
    rows, apart = 1000, 0.25
    null = paired_difference(
        np.repeat([1.0, 0.0, 1.0], (125, 125, 750)), np.repeat([0.0, 1.0, 1.0], (125, 125, 750))
    )
    assert null.minimum_detectable_effect is not None
    shares = (
        (apart + null.minimum_detectable_effect) / 2,
        (apart - null.minimum_detectable_effect) / 2,
        1 - apart,
    )
    shown = 0
    for _ in range(TIMES):
        counts = rng.multinomial(rows, shares)
        shown += (
            paired_difference(np.repeat([1.0, 0.0, 1.0], counts), np.repeat([0.0, 1.0, 1.0], counts)).p
            <= 0.05
        )
    assert within_99_percent(shown, 0.8), shown


@pytest.mark.slow
def test_the_interval_of_rows_needed_covers_the_truth() -> None:
    """Accuracies of 0.60, 0.70 and 0.78 at 100, 400 and 1,600 rows: 0.74 is half way between the last two, at 800."""
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(TIMES):
        hard = np.tile(rng.random(1000), (4, 1))  # the same rows are hard for all, half of the time
        hard = np.where(rng.random((4, 1000)) < 0.5, hard, rng.random((4, 1000)))
        scores = [
            (row < share).astype(float)
            for row, share in zip(hard, (0.60, 0.70, 0.78, 0.74), strict=True)
        ]
        low, high = label_efficiency(list(zip((100, 400, 1600), scores[:3], strict=True)), scores[3])[1]
        covered += low is not None and low <= 800 and (high is None or high >= 800)
    assert within_99_percent(covered, 0.95), covered
