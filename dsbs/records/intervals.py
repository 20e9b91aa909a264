"""Wilson score interval: a rate with its 95% interval."""

from __future__ import annotations

from pydantic import BaseModel


class Rate(BaseModel, frozen=True):
    """``correct`` of ``n`` with the 95% Wilson score interval (Wilson, 1927), as fractions."""

    value: float
    ci95: tuple[float, float]
    correct: int
    n: int


def wilson(correct: int, n: int) -> Rate | None:
    """The rate of ``correct`` in ``n`` trials with its 95% interval; None for no trials."""
    if n == 0:
        return None
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    return Rate(
        value=correct / n, ci95=(float(interval.low), float(interval.high)), correct=correct, n=n
    )
