"""``eval/results.json``: what evaluation found and the report shows.

Shares, accuracies and their differences are fractions in [0, 1], times are seconds unless the name ends in ``_ms``, money is
US dollars. Intervals are of 95 %.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsbs.errors import UserError

Interval = tuple[float, float]
SystemKind = Literal["teacher", "student", "external"]


class Metric(NamedTuple):
    """What a metric is called, which way is better (None: neither), and where it comes from."""

    title: str
    higher_is_better: bool | None
    source: str


# In the order in which they are shown. What is written under another name is a mistake in eval/.
METRICS: dict[str, Metric] = {
    "exact_match_raw": Metric(
        "Exact match, raw text",
        True,
        "as the paper's code has it: the output's text is the gold label's",
    ),
    "exact_match": Metric(
        "Exact match",
        True,
        "the label that is read in the output is the gold one, letter by letter",
    ),
    "equation_string": Metric(
        "Equation, text", True, "the output's text is the gold equation's, spaces aside"
    ),
    "equation_value": Metric(
        "Equation, value", True, "Hsieh et al., 2023, section 4: values within 1e-4 of each other"
    ),
    "parse_failure": Metric(
        "Outputs that cannot be read", False, "share of outputs in which no label can be read"
    ),
    "macro_f1": Metric(
        "Macro-F1",
        True,
        "mean of the classes' F1, of those that are gold or predicted (scikit-learn)",
    ),
    "ece": Metric(
        "Expected calibration error", False, "Guo et al., 2017, equation 3: 10 bins of equal width"
    ),
    "rouge_l": Metric(
        "ROUGE-L against the teacher's rationale",
        True,
        "Lin, 2004: F1 of the longest common subsequence of words; likeness of wording, secondary to all else",
    ),
    "rationale_empty": Metric("Empty rationales", False, "share of rationales without a word"),
    "rationale_truncated": Metric(
        "Truncated rationales", False, "share of rationales that ended with their token budget"
    ),
    "consistency": Metric(
        "Rationale and label agree",
        True,
        "of the rationales that state a conclusion, the share that states the label given",
    ),
}


class Rate(BaseModel, frozen=True):
    """``correct`` of ``n`` with the 95% Wilson score interval (Wilson, 1927), as fractions."""

    value: float
    ci95: Interval
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


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Measure(_Part):
    """One metric of a system on the rows that it can be told of."""

    value: float
    ci95: Interval | None = None  # None: not a mean over rows, and not resampled
    n: int  # rows


class GradedComparison(_Part):
    """The same for a metric that grades rows: ``delta`` is the difference of means over the ``n`` rows that both tell of."""

    delta: float
    ci95: Interval
    p: float  # two-sided
    p_holm: float  # Holm (1979), over all comparisons by this metric
    test: str
    n: int


class Comparison(_Part):
    """A system against another one on the same rows; ``delta`` is the system's accuracy less the other's.

    ``wins`` rows are right here and wrong there, ``losses`` ones the other way round, by the mean over seeds. ``minimum_detectable_effect``
    is the smallest true difference that so many rows would show with 80 % power; None where no row differs.
    """

    delta: float
    ci95: Interval
    p: float  # two-sided
    p_holm: float  # Holm (1979), over all comparisons of the file
    test: str
    wins: int
    losses: int
    minimum_detectable_effect: float | None = None
    graded: dict[str, GradedComparison] = {}  # by metric


class Bin(_Part):
    """Predictions to which the system gave a probability in (low, high], its mean there and the share that was right."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


BATCH_SIZES = (1, 64)  # that a student is timed with


class Latency(_Part):
    """Wall time of a call with ``batch_size`` rows, label alone, over ``calls`` calls."""

    batch_size: int
    calls: int
    p50_ms: float
    p95_ms: float
    device: str


class SystemResult(_Part):
    """One line of the comparison: the teacher, the students of one method over their seeds, or a file from outside."""

    name: str
    kind: SystemKind
    method: str | None = None  # of students
    labels: str | None = None  # whose labels the students learned: gold or teacher
    subset: float | None = None  # the share of the train rows; None: not a student
    training_rows: int | None = None
    seeds: list[int] = []
    accuracy: float
    ci95: Interval
    interval: str  # how it was found
    accuracy_per_seed: list[float] = []
    unreadable: float  # share of outputs that are no label of the task
    metrics: dict[str, Measure] = {}  # by the names in METRICS, in their order
    recall: dict[str, Measure] = {}  # of each label of a closed set
    calibration: list[Bin] = []  # where the labels' probabilities are known
    parameters: int | None = None
    megabytes: float | None = None  # of the weights on disk
    ms_per_example: float | None = None  # median over rows of a batch's time divided by its rows
    latency: list[Latency] = []
    train_s: float | None = None  # mean over seeds
    usd_per_prediction: float | None = None  # the teacher's; None: unknown
    versus: dict[str, Comparison] = {}


class LabelEfficiency(_Part):
    """How many labels a method needs to be as accurate as another system, read off its curve (log-linear between points).

    ``rows`` and the ends of ``ci95`` are None where the curve does not reach the accuracy within the rows tried.
    """

    method: str  # the curve's
    labels: str
    system: str  # the one to be matched
    accuracy: float  # of that one
    rows: int | None
    ci95: tuple[int | None, int | None]
    smallest: int  # rows of the curve's first point; ``rows`` of so many are at most so many
    largest: int  # and of its last


class BreakEven(_Part):
    """When distilling pays for itself against calling the teacher for each prediction."""

    system: str
    spent_usd: float  # the teacher's bill for the rows that the students learned from
    teacher_usd_per_prediction: float
    predictions: int


class Results(_Part):
    """The whole file."""

    schema_: Literal["dsbs.results/3"] = Field("dsbs.results/3", alias="schema")
    run: str
    name: str  # of the recipe
    recipe: dict[str, Any] = {}  # resolved
    data: dict[str, str] = {}  # split -> hash of its rows
    task: str
    split: str
    n: int  # rows
    cluster: str | None = None  # the field whose equal values make rows belong together
    clusters: int | None = None  # how many there are
    baseline: (
        str | None
    )  # the first system that others are compared with; None: nothing is compared
    headline: (
        str | None
    )  # the system that the recipe is about: of its first method that is no baseline, on the largest share
    reportable: bool
    systems: list[SystemResult]
    label_efficiency: list[LabelEfficiency] = []
    break_even: list[BreakEven] = []

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True
    )

    def system(self, name: str | None) -> SystemResult | None:
        return next((one for one in self.systems if one.name == name), None)

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)


def read_results(run: Path) -> Results:
    """The results of a run. Raises UserError where there are none, or none that can be read."""
    path = run / "eval" / "results.json"
    again = "run `dsbs eval` again: it is rebuilt from the prediction files, with no model (--score-only)"
    try:
        return Results.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist", hint="run `dsbs eval` with this recipe first"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path} is not of this version ({where}: {first['msg']})", hint=again
        ) from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON", hint=again) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", hint=again) from None
