"""Results of an evaluation: ``eval/results.json``, and ``compress.json`` of a compressed student.

Shares, accuracies and their differences are fractions in [0, 1], times are seconds unless the name
ends in ``_ms``, money is in US dollars. Intervals are 95% confidence intervals.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from dsbs.errors import UserError
from dsbs.records.measures import Cascade, Interval, Measure, ResultRecord, Selective
from dsbs.records.reviews import ReviewedSplit
from dsbs.records.subsets import Subset

SCHEMA = "dsbs.results/5"
_READABLE = ("dsbs.results/3", "dsbs.results/4", SCHEMA)  # 3: no floors; 4: a single student
BATCH_SIZES = (1, 64)  # that a student is timed with

SystemKind = Literal["teacher", "student", "external", "floor"]


def _is_none(value: object) -> bool:
    return value is None


def _is_empty(value: object) -> bool:
    return not value


class GradedComparison(ResultRecord):
    """A comparison by a metric that grades rows instead of calling them right or wrong."""

    delta: float
    """Difference of means over the ``n`` rows for which both systems have a value."""
    ci95: Interval
    p: float
    """Two-sided."""
    p_holm: float
    """Holm (1979), over all comparisons by this metric."""
    test: str
    n: int


class Comparison(ResultRecord):
    """A system against another one on the same rows."""

    delta: float
    """The system's accuracy minus the other's."""
    ci95: Interval
    p: float
    """Two-sided."""
    p_holm: float
    """Holm (1979), over all comparisons of the file."""
    test: str
    wins: int
    """Rows with a higher score here than in the other system, averaged over seeds."""
    losses: int
    """Rows with a lower score here."""
    minimum_detectable_effect: float | None = None
    """The smallest true difference that this test set detects with 80% power; None: unknown."""
    delta_per_seed: dict[int, float] = Field({}, exclude_if=_is_empty)
    """The difference by seed, for the seeds that both systems have."""
    graded: dict[str, GradedComparison] = {}
    """By metric."""


class FloorComparison(ResultRecord):
    """A student against a floor on the same rows, outside Holm's family of comparisons."""

    delta: float
    """The student's accuracy minus the floor's."""
    ci95: Interval
    p: float
    """Two-sided, of this comparison alone."""
    test: str
    wins: int
    """Rows with a higher score here than in the floor, averaged over seeds."""
    losses: int

    @property
    def is_beaten(self) -> bool:
        """Whether the whole interval is on the student's side."""
        return self.ci95[0] > 0


class Bin(ResultRecord):
    """Predictions with a probability in (low, high]: their mean probability and accuracy."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


class Latency(ResultRecord):
    """Wall time of a call with ``batch_size`` rows that predicts labels, over ``calls`` calls."""

    batch_size: int
    calls: int
    p50_ms: float
    p95_ms: float
    device: str


class Confusion(ResultRecord):
    """Rows of one label that a system gives another."""

    gold: str
    predicted: str
    rows: float
    """Mean over seeds."""
    share: float
    """Of the rows with the gold label."""


class PartResult(ResultRecord):
    """A possible label of a row (several labels), or a field (extraction)."""

    accuracy: Measure
    """The share of the rows in which it is right, or rightly absent."""
    precision: Measure | None
    """Of the rows for which it is predicted. None: it never is."""
    recall: Measure | None
    """Of the rows that have it. None: none has."""
    f1: Measure | None
    gold: int
    """Rows that have it."""
    predicted: float
    """Rows for which it is predicted, averaged over seeds."""
    ece: Measure | None = Field(None, exclude_if=_is_none)
    """Expected calibration error of a field's probability, over the readable answers of all seeds.
    None: it has no probability."""
    confidence_auroc: Measure | None = Field(None, exclude_if=_is_none)
    """The chance that a right value of a field is surer than a wrong one, averaged over seeds."""


class SystemResult(ResultRecord):
    """One system: the teacher, the students of one method over their seeds, a floor, or an external
    file.
    """

    name: str
    kind: SystemKind
    student: str | None = Field(None, exclude_if=_is_none)
    """Of several students: the name in the recipe."""
    method: str | None = None
    """Of students."""
    floor: str | None = None
    """The floor, as ``eval.floors`` names it."""
    labels: str | None = None
    """Whose labels a student or a floor learned: gold or teacher."""
    subset: Subset | None = None
    """The training rows: a share of them, or rows per label. None: it learned from none."""
    training_rows: int | None = None
    seeds: list[int] = []
    accuracy: float
    ci95: Interval
    interval: str
    """The method of ``ci95``."""
    accuracy_per_seed: list[float] = []
    unreadable: float
    """Share of outputs from which no label of the task can be read."""
    metrics: dict[str, Measure] = {}
    """By name, in the order of ``dsbs.config.registry.METRICS``."""
    recall: dict[str, Measure] = {}
    """By label of a closed set."""
    confusions: list[Confusion] = []
    """The pairs of labels that are most often confused, at most 20; empty for open labels."""
    parts: dict[str, PartResult] = Field({}, exclude_if=_is_empty)
    """By possible label of a row, or by field, where labels consist of such parts."""
    calibration: list[Bin] = []
    """Empty where the probability of a label is unknown."""
    selective: Selective | None = None
    """None where the probability of a label is unknown."""
    parameters: int | None = None
    megabytes: float | None = None
    """Of the weight files, in units of 10^6 bytes."""
    ms_per_example: float | None = None
    """Median over rows of a batch's time divided by its rows."""
    latency: list[Latency] = []
    train_s: float | None = None
    """Mean over seeds."""
    usd_per_prediction: float | None = None
    """Of the teacher; None: unknown."""
    versus: dict[str, Comparison] = {}
    """By the system that it is compared with."""
    versus_students: dict[str, Comparison] = Field({}, exclude_if=_is_empty)
    """By the same method's system of another student, which the recipe names later."""
    versus_floors: dict[str, FloorComparison] = {}
    """Of students: by floor, of the same share of the training rows."""
    settings_tried: int | None = Field(None, exclude_if=_is_none)
    """Of several students: the settings that tuning tried. 0: not tuned."""

    @property
    def comparisons(self) -> dict[str, Comparison]:
        """All of Holm's family: with other methods and files, and with other students."""
        return self.versus | self.versus_students


class LabelEfficiency(ResultRecord):
    """How many training rows a method needs to match another system's accuracy.

    Read off the method's learning curve, log-linear between its points. ``rows`` and the ends of
    ``ci95`` are None where the curve does not reach that accuracy within the rows tried.
    """

    student: str | None = Field(None, exclude_if=_is_none)
    """Of the curve, where the recipe has several."""
    method: str
    """Of the curve."""
    labels: str
    system: str
    """To be matched."""
    accuracy: float
    """Of ``system``."""
    rows: int | None
    ci95: tuple[int | None, int | None]
    smallest: int
    """Rows of the curve's first point; a result of this number means at most so many."""
    largest: int
    """Rows of the curve's last point."""


class BreakEven(ResultRecord):
    """After how many predictions distilling is cheaper than calling the teacher for each."""

    system: str
    spent_usd: float
    """The teacher's bill for the rows that the students learned from."""
    teacher_usd_per_prediction: float
    predictions: int


class Results(ResultRecord):
    """The whole file."""

    schema_: Literal["dsbs.results/3", "dsbs.results/4", "dsbs.results/5"] = Field(
        "dsbs.results/5", alias="schema"
    )
    run: str
    name: str
    """Of the recipe."""
    recipe: dict[str, Any] = {}
    """Resolved."""
    data: dict[str, str] = {}
    """Split -> hash of its rows."""
    task: str
    split: str
    n: int
    """Rows."""
    cluster: str | None = None
    """The input field whose equal values make rows one cluster."""
    clusters: int | None = None
    """The number of clusters."""
    baseline: str | None
    """The first system that others are compared with; None: nothing is compared."""
    headline: str | None
    """The system that the recipe is about."""
    reportable: bool
    systems: list[SystemResult]
    label_efficiency: list[LabelEfficiency] = []
    break_even: list[BreakEven] = []
    cascades: list[Cascade] = []
    """With ``eval.cascade``: for each prediction file with a confidence."""
    reviews: dict[str, ReviewedSplit] = Field({}, exclude_if=_is_empty)
    """By split that people reviewed."""

    model_config = ConfigDict(populate_by_name=True)

    def system(self, name: str | None) -> SystemResult | None:
        return next((system for system in self.systems if system.name == name), None)

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)


def read_results(path: Path) -> Results:
    """Read a results file. Raises UserError where there is none, or it cannot be read."""
    rebuild = (
        "run `dsbs eval RECIPE --score-only`: it rebuilds the file from the prediction files, "
        "without loading a model"
    )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Results.model_validate(content)
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist", hint="run `dsbs eval` with this recipe first"
        ) from None
    except ValidationError as error:
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema not in _READABLE:
            raise UserError(
                f"{path} has schema {schema!r}; this version of dsbs reads {SCHEMA!r}",
                hint=rebuild,
            ) from None
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is not valid ({field}: {first['msg']})", hint=rebuild) from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON", hint=rebuild) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", hint=rebuild) from None


COMPRESSION_RECORD = "compress.json"


class Measurement(ResultRecord):
    """Accuracy, size and latency of one student on the valid rows."""

    accuracy: float
    megabytes: float
    """Size of the weight files."""
    parameters: int | None = None
    """None: unknown for the student's format."""
    latency: list[Latency]
    """One entry per batch size."""

    def median_ms(self, batch_size: int) -> float | None:
        """Median time of a call with ``batch_size`` rows; None: not measured."""
        for latency in self.latency:
            if latency.batch_size == batch_size:
                return latency.p50_ms
        return None


HealFrom = Literal["original", "rows", "both"]


def chain_name(chain: Sequence[str], healed_by: Sequence[HealFrom | None]) -> str:
    """The name of a chain: its steps, each with what it healed from unless that is the original."""
    names = []
    for index, step in enumerate(chain):
        healer = healed_by[index] if index < len(healed_by) else None
        names.append(step if healer in (None, "original") else f"{step}@{healer}")
    return "+".join(names)


class Compressed(ResultRecord):
    """One compressed student. Its folder is a student's folder like any other."""

    schema_: Literal["dsbs.compress/1"] = Field("dsbs.compress/1", alias="schema")
    student: str
    """Name of the student that the chain started from."""
    fingerprint: str
    """Fingerprint of that student."""
    chain: tuple[str, ...]
    """The steps in order, as on the command line: prune-ff=0.5, quantize=int8."""
    n: int
    """Number of valid rows."""
    healed_by: tuple[HealFrom | None, ...] = ()
    """What each step's healing learned from; None: it had none. Empty in records of earlier
    versions, whose steps healed from rows."""
    original: Measurement
    compressed: Measurement
    agreement: float
    """Share of rows with the same label as the original."""
    before_healing: float | None = None
    """Accuracy before the last step's healing; None: it had none."""
    healing_steps: int = 0
    """Optimizer steps of the last step's healing."""
    max_drop: float
    """Largest acceptable loss of accuracy."""
    accepted: bool
    """Whether the loss is within ``max_drop``."""
    seconds: float
    """Duration of the last step, with its healing."""
    layers: dict[str, list[int]] = {}
    """By stack, the original's layers that are left, from 1. Empty: no step dropped layers."""
    dropped_layers: dict[str, list[int]] = {}
    """By stack, the original's layers that the last step dropped."""
    layer_scores: dict[str, dict[int, float]] = {}
    """By stack, the importance of each of the original's layers that the last step could drop; the
    least important were dropped."""
    layers_by: str | None = None
    """What that importance is: influence, loss, or position, which has no scores."""
    rounds: int = 1
    """In how many parts the last step removed its share."""

    @property
    def name(self) -> str:
        return chain_name(self.chain, self.healed_by)

    @property
    def healer(self) -> HealFrom | None:
        """What the last step's healing learned from; None: it had none."""
        if self.healed_by:
            return self.healed_by[-1]
        return "rows" if self.healing_steps else None

    @property
    def recovered(self) -> float | None:
        """The share of the lost accuracy that the last step's healing recovered.

        The loss is that of the whole chain against the original, before the healing. Above 1 the
        student is better than the original; below 0 healing made it worse. None: no healing, or no
        loss.
        """
        if self.before_healing is None or self.before_healing >= self.original.accuracy:
            return None
        loss = self.original.accuracy - self.before_healing
        return (self.compressed.accuracy - self.before_healing) / loss


def read_compression_record(folder: Path) -> Compressed:
    """A compressed student's record. Raises UserError where it cannot be read."""
    path = folder / COMPRESSION_RECORD
    try:
        return Compressed.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        raise UserError(
            f"{path} is not a record of a compressed student", hint="compress that student again"
        ) from None
