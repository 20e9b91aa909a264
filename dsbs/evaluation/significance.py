"""Significance of paired differences: McNemar's test, a permutation test, Holm, and power.

Units are rows of the test set, or clusters of them; seeds are averaged within a row first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsbs.evaluation.bootstrap import (
    RESAMPLES,
    SEED,
    Clusters,
    Floats,
    Scores,
    is_binary,
    mean_interval,
    paired_differences,
    sums_and_sizes,
    validated,
)

_MAX_DENOMINATOR = 12  # means over up to this many seeds are recognized as fractions
_MAX_MULTIPLICATIONS = 200_000_000  # for an exact p value: a tenth of a second
_BATCH = 1_000_000  # signs in memory at once


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference of mean scores (fractions), its 95% interval and a two-sided p value."""

    delta: float
    ci95: tuple[float, float]
    p: float
    test: str
    wins: int  # rows with the higher score in the first system
    losses: int  # rows with the higher score in the second
    minimum_detectable_effect: float | None


def paired_difference(a: Scores, b: Scores, clusters: Clusters = None) -> Difference:
    """Compare two systems on the same rows; with clusters, whole clusters are the units.

    p: exact McNemar (McNemar, 1947) for rows that are right or wrong, without clusters. Otherwise,
    for means over seeds, graded scores and clusters, `permutation_test`. ci95: paired bootstrap.
    Raises ValueError for scores of different lengths, no rows, NaN, or clusters of another length.
    """
    first = validated(a, clusters)
    second = validated(b)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} rows against {len(second)}")
    differences = paired_differences(first, second)
    wins = int((differences > 0).sum())
    losses = int((differences < 0).sum())
    units = sums_and_sizes(differences, clusters)
    if clusters is None and is_binary(first) and is_binary(second):
        p = _mcnemar(wins, losses)
        test = "mcnemar-exact"
    else:
        p, is_exact = permutation_test(units[:, 0])
        test = "sign-flip permutation" if is_exact else "approximate randomization"
        if clusters is not None:
            test += " over clusters"
    return Difference(
        delta=float(differences.mean()),
        ci95=mean_interval(differences, clusters, lowest=-1.0),
        p=p,
        test=test,
        wins=wins,
        losses=losses,
        minimum_detectable_effect=minimum_detectable_effect(units[:, 0], units[:, 1]),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p values, in the given order."""
    if not p_values:
        return []
    order = np.argsort(p_values)
    stepwise = np.asarray(p_values, dtype=float)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepwise), 1.0)
    return [float(p) for p in adjusted]


def _mcnemar(wins: int, losses: int) -> float:
    from scipy.stats import binomtest

    if wins + losses == 0:
        return 1.0
    return float(binomtest(wins, wins + losses, 0.5).pvalue)


# --- permutation test


def permutation_test(differences: Floats) -> tuple[float, bool]:
    """The two-sided p value of the sum of ``differences`` (units,), and whether it is exact.

    The sign-flip test: if the systems were equal, each difference could as well have the opposite
    sign. Exact (Fisher, 1935, section 21) for few units, and where the differences are multiples
    of 1/k for some k up to 12, as means of right and wrong over k seeds are. Otherwise approximate
    randomization (Noreen, 1989) with 9,999 seeded draws of all signs, the observed one counted
    with them. For differences of 0 and 1 this is McNemar's exact test.
    """
    sizes = np.sort(np.abs(differences))  # sorted: the draws do not depend on the order of units
    sizes = sizes[sizes > 1e-12]  # a cluster's sum may be zero only up to rounding
    observed = abs(float(differences.sum()))
    for denominator in range(1, _MAX_DENOMINATOR + 1):
        multiples = np.rint(sizes * denominator)
        if np.allclose(sizes * denominator, multiples, rtol=0, atol=1e-9):
            p = _exact_p(multiples.astype(np.int64), round(observed * denominator))
            if p is not None:
                return p, True
            break
    observed -= 1e-12 * float(sizes.sum())  # sums that differ only by rounding are equal
    hits = tried = 0
    for signs in sign_patterns(len(sizes)):
        hits += int((np.abs(signs @ sizes) >= observed).sum())
        tried += len(signs)
    if tried == 2 ** len(sizes):
        return hits / tried, True
    return (hits + 1) / (tried + 1), False


def _exact_p(sizes: NDArray[np.int64], observed: int) -> float | None:
    """The share of sign patterns whose sum is at least ``observed``; None where it takes too long.

    The distribution of the sum is a convolution of binomials, one for each distinct size.
    """
    from scipy.stats import binom

    distinct, counts = np.unique(sizes, return_counts=True)
    groups = list(zip(distinct.tolist(), counts.tolist(), strict=True))
    multiplications = 0
    length = 1
    for size, count in groups:
        added = 2 * size * count + 1
        multiplications += length * added
        length += added - 1
    if multiplications > _MAX_MULTIPLICATIONS:
        return None
    mass = np.ones(1)  # of the sums -reach, …, reach
    for size, count in groups:
        binomial = np.zeros(2 * size * count + 1)
        binomial[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        mass = np.convolve(mass, binomial)
    reach = len(mass) // 2
    sums = np.abs(np.arange(-reach, reach + 1))
    return min(1.0, float(mass[sums >= observed].sum()))


def sign_patterns(units: int) -> Iterator[Floats]:
    """Arrays (b, units) of -1 and 1: all patterns if there are at most 9,999, else random ones."""
    if 2**units <= RESAMPLES:
        patterns = np.arange(2**units)[:, None] >> np.arange(units) & 1
        yield patterns.astype(np.float64) * 2 - 1
        return
    rng = np.random.default_rng(SEED)
    num_bytes = -(-units // 8)  # a sign is a bit
    batch = max(1, _BATCH // units)
    for start in range(0, RESAMPLES, batch):
        size = min(batch, RESAMPLES - start)
        drawn = np.frombuffer(rng.bytes(size * num_bytes), dtype=np.uint8).reshape(-1, num_bytes)
        yield np.unpackbits(drawn, axis=1, count=units).astype(np.float64) * 2 - 1


# --- power


def minimum_detectable_effect(sums: Floats, sizes: Floats) -> float | None:
    """The smallest true difference that a two-sided test at .05 detects with 80% power.

    ``sums`` (units,): a row's difference, or a cluster's summed differences; ``sizes`` (units,):
    the units' rows. The power of the paired t test (Cohen, 1988, section 2.3.5) with the observed
    standard deviation; for clusters, that of a sum minus its rows' share of the mean difference.
    Returns a fraction; None where units do not vary or even a difference of 1 is not detectable.
    """
    from scipy.optimize import brentq
    from scipy.special import nctdtr
    from scipy.stats import t

    units = len(sums)
    if units < 2:
        return None
    deviation = float(np.std(sums - sizes * (sums.sum() / sizes.sum()), ddof=1))
    if math.isclose(deviation, 0.0, abs_tol=1e-12):
        return None
    critical = t.isf(0.025, units - 1)

    def power(effect: float) -> float:
        """The power of the upper tail at .025; the lower one adds less than a millionth."""
        return float(1 - nctdtr(units - 1, effect * math.sqrt(units), critical))

    # 20 / sqrt(units) has 80% power even with two units.
    effect = brentq(
        lambda x: power(x) - 0.8,
        0.0,
        20 / math.sqrt(units),
        xtol=1e-12,
    )
    difference = float(effect) * deviation * units / float(sizes.sum())
    if difference > 1:
        return None
    return difference
