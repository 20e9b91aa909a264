"""Measures of a system: metrics, selective prediction, and a cascade with its teacher.

Shares and accuracies are fractions in [0, 1], money is in US dollars. Intervals are 95% confidence
intervals.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Interval = tuple[float, float]
COVERAGES = (0.5, 0.7, 0.8, 0.9)  # the shares of the rows in selective prediction


class Rate(BaseModel, frozen=True):
    """``correct`` of ``n`` with a 95% interval, as fractions."""

    value: float
    ci95: Interval
    correct: int
    n: int


def wilson(correct: int, n: int) -> Rate | None:
    """The rate of ``correct`` in ``n`` trials with its score interval (Wilson, 1927); None for no
    trials.
    """
    return _rate(correct, n, "wilson")


def exact_rate(correct: int, n: int) -> Rate | None:
    """As ``wilson``, with the exact interval (Clopper and Pearson, 1934)."""
    return _rate(correct, n, "exact")


def _rate(correct: int, n: int, method: Literal["wilson", "exact"]) -> Rate | None:
    if n == 0:
        return None
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(confidence_level=0.95, method=method)
    return Rate(
        value=correct / n, ci95=(float(interval.low), float(interval.high)), correct=correct, n=n
    )


class ResultRecord(BaseModel):
    """A closed and frozen record of ``eval/results.json``."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )


class Measure(ResultRecord):
    """One metric of a system, on the rows for which it is defined."""

    value: float
    ci95: Interval | None = None
    """None: not a mean over rows, and not resampled."""
    n: int
    """Rows."""


class Selective(ResultRecord):
    """Selective prediction: what a system is worth on the answers that it is surest of."""

    confidence: list[str]
    """Its kind, or those of several seeds: probability, margin, entropy or views."""
    measures: dict[str, Measure]
    """aurc, the area under the risk-coverage curve; e_aurc, its excess over that of the best order
    of the same answers; accuracy_at_50, _70, _80 and _90, on these percentages of the rows."""
    curve: list[tuple[float, float]]
    """(coverage, share of wrong answers among those covered), averaged over seeds."""


class CascadePoint(ResultRecord):
    """A cascade on the test rows at one threshold."""

    coverage: float
    agreement: float
    accuracy: float
    usd_per_1000: float | None = None


class Cascade(ResultRecord):
    """A student in front of its teacher: the threshold, and what it showed on test rows."""

    system: str
    student: str
    """The name of its prediction file."""
    confidence: str
    """The kind of confidence."""
    threshold: float | None
    """The student answers where its confidence is at least this. None: no threshold holds, and the
    teacher answers everything."""
    of: Literal["agreement", "accuracy"]
    target: float | None
    margin: float | None = None
    """Of accuracy, in place of a target: the largest acceptable loss against the teacher alone."""
    level: float
    """Of the bound."""
    bound: float | None
    """The agreement or accuracy, at least, or with a margin the loss, at most, that the calibration
    rows guarantee at this level."""
    source: str
    """The split that the calibration rows are from."""
    rows: int
    """Calibration rows."""
    folds: int | None = None
    """Cross-fitting: the threshold is chosen on all rows, and each row is tested with that of the
    other folds. None: calibration and test rows differ."""
    rows_needed: int | None = None
    """Where no threshold holds: so many calibration rows might do. None: more rows do not help."""
    n: int
    """Test rows."""
    left_out: int = 0
    """Rows without a readable label of the teacher, which are neither."""
    coverage: Measure
    """The share of the test rows that the student answers."""
    agreement: Measure
    """The share on which the answer does not differ from the teacher's."""
    accuracy: Measure
    """Of the cascade."""
    teacher_accuracy: Measure
    student_accuracy: Measure
    """Of the student alone."""
    usd_per_1000: float | None = None
    """Of the teacher, for 1,000 requests of the cascade."""
    teacher_usd_per_1000: float | None = None
    ms_per_request: float | None = None
    """The student's median time for every request, and the teacher's mean time for those that it
    answers. None: a time is not known, or the student's confidence takes more than its answer."""
    teacher_ms: float | None = None
    """Mean time of a reply."""
    break_even: int | None = None
    """Requests after which the teacher's bill for the training rows is recovered."""
    curve: list[CascadePoint] = []
    """From the strictest threshold to the loosest."""
