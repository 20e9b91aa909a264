"""The sign-flip test of paired differences: were the two systems equal, each difference could as well have the other sign."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dsbs.evaluation.bootstrap import RESAMPLES, SEED, Floats

_PARTS = 12  # means over up to so many seeds are told from other numbers
_LARGEST = 200_000_000  # multiplications for an exact p value: a tenth of a second
_BATCH = 1_000_000  # signs held at once


def flip_test(differences: Floats) -> tuple[float, bool]:
    """(units,) -> the two-sided p value of their sum, and whether it is exact.

    Exact (Fisher, 1935, section 21) where the differences are whole numbers, or whole parts up to twelfths, as means of right
    and wrong over seeds are; and for few units. Otherwise approximate randomisation (Noreen, 1989) by 9,999 seeded draws of
    all signs, the observed one counted with them. For differences of 0 and 1 this is McNemar's exact test.
    """
    sizes = np.sort(np.abs(differences))  # sorted: the draws do not depend on the order of units
    sizes = sizes[sizes > 1e-12]  # a cluster's sum may be zero but for rounding
    seen = abs(float(differences.sum()))
    for parts in range(1, _PARTS + 1):
        whole = np.rint(sizes * parts)
        if np.allclose(sizes * parts, whole, rtol=0, atol=1e-9):
            p = _exact(whole.astype(np.int64), round(seen * parts))
            if p is not None:
                return p, True
            break
    seen -= 1e-12 * float(sizes.sum())  # sums that are equal but for rounding are as large
    hits = tried = 0
    for signs in _signs(len(sizes)):
        hits += int((np.abs(signs @ sizes) >= seen).sum())
        tried += len(signs)
    if tried == 2 ** len(sizes):
        return hits / tried, True
    return (hits + 1) / (tried + 1), False


def _exact(sizes: NDArray[np.int64], seen: int) -> float | None:
    """The distribution of the flipped sum as a product of binomials, one for each distinct size; None where it is too long."""
    from scipy.stats import binom

    distinct, counts = np.unique(sizes, return_counts=True)
    cost, length = 0, 1
    for size, count in zip(distinct.tolist(), counts.tolist(), strict=True):
        step = 2 * size * count + 1
        cost, length = cost + length * step, length + step - 1
    if cost > _LARGEST:
        return None
    mass = np.ones(1)  # of the sums -reach, ..., reach
    for size, count in zip(distinct.tolist(), counts.tolist(), strict=True):
        one = np.zeros(2 * size * count + 1)
        one[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        mass = np.convolve(mass, one)
    reach = len(mass) // 2
    sums = np.abs(np.arange(-reach, reach + 1))
    return min(1.0, float(mass[sums >= seen].sum()))


def _signs(units: int) -> Iterator[Floats]:
    """Arrays (b, units) of -1 and 1: every pattern where there are at most 9,999, else so many at random."""
    if 2**units <= RESAMPLES:
        patterns = np.arange(2**units)[:, None] >> np.arange(units) & 1
        yield patterns.astype(np.float64) * 2 - 1
        return
    rng = np.random.default_rng(SEED)
    width = -(-units // 8)  # bytes: a sign is a bit
    batch = max(1, _BATCH // units)
    for start in range(0, RESAMPLES, batch):
        drawn = np.frombuffer(
            rng.bytes(min(batch, RESAMPLES - start) * width), dtype=np.uint8
        ).reshape(-1, width)
        yield np.unpackbits(drawn, axis=1, count=units).astype(np.float64) * 2 - 1
