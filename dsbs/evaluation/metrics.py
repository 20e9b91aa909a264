"""Metrics: scoring of predictions against gold labels, and the metrics of labels.

A metric is one `Metric` record, registered by its name in ``dsbs.config.registry.METRICS``. Rows
are the units of all intervals: values of several seeds are averaged within a row first. Metrics
of labels with several parts are in ``metrics_of_parts.py``, those of numbers on a scale in
``metrics_of_scores.py``, and those of rationales in ``rationales.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dsbs.config.registry import METRICS, entry
from dsbs.errors import UserError
from dsbs.evaluation.aggregates import RowSums, RowValues
from dsbs.evaluation.bootstrap import Clusters, Floats, counts_interval, mean_interval
from dsbs.records import Example, Prediction, Unreadable
from dsbs.records.measures import Measure
from dsbs.records.results import Confusion
from dsbs.tasks import Task

_MAX_CONFUSIONS = 20  # pairs of labels that results keep


# --- scoring


@dataclass(frozen=True, slots=True)
class Scored:
    """Predictions scored against gold labels; all sequences are parallel to ``rows``.

    ``labels`` are read again from the raw outputs, so that a better parser needs no new
    predictions; None: unreadable.
    """

    rows: Sequence[Example]
    predictions: list[Prediction]
    labels: list[str | None]
    correct: NDArray[np.bool_]  # (rows,)

    @property
    def gold(self) -> list[str]:
        return [str(row.label) for row in self.rows]


def score(
    task: Task, rows: Sequence[Example], predictions: Mapping[str, Prediction], system: str
) -> Scored:
    """Read and mark a system's predictions, joined to rows by id. All rows have gold labels.

    Raises UserError where there are no rows, predictions are missing or made for other inputs.
    """
    if not rows:
        raise UserError(
            "nothing to score: no row of the split has a gold label",
            hint="check eval.split and task.columns",
        )
    missing = [row.id for row in rows if row.id not in predictions]
    if missing:
        raise UserError(
            f"the predictions of {system} lack {len(missing)} of {len(rows)} rows "
            f"(first: {missing[0]!r})",
            hint="a student's file: remove it and run `dsbs eval` again; "
            "an external file: add a line for every row",
        )
    joined = [predictions[row.id] for row in rows]
    changed = [
        row.id
        for row, prediction in zip(rows, joined, strict=True)
        if prediction.input is not None and prediction.input != row.input
    ]
    if changed:
        raise UserError(
            f"the predictions of {system} were made for other inputs in {len(changed)} of "
            f"{len(rows)} rows (first: {changed[0]!r})",
            hint="the data has changed since: run `dsbs eval` without --score-only",
        )
    labels = _read_labels(task, rows, joined)
    correct = [
        bool(label) and task.correct(str(label), str(row.label))
        for row, label in zip(rows, labels, strict=True)
    ]
    return Scored(rows, joined, labels, np.asarray(correct, dtype=np.bool_))


def _read_labels(
    task: Task, rows: Sequence[Example], predictions: Sequence[Prediction]
) -> list[str | None]:
    cache: dict[
        str, str | Unreadable
    ] = {}  # a few distinct outputs often stand for thousands of rows
    labels = []
    for row, prediction in zip(rows, predictions, strict=True):
        if task.needs_fields or prediction.distribution is not None:
            label = task.answer(prediction.raw, row.input, prediction.distribution)
        elif prediction.raw in cache:
            label = cache[prediction.raw]
        else:
            label = task.read_label(prediction.raw, row.input)
            cache[prediction.raw] = label
        labels.append(None if isinstance(label, Unreadable) else label)
    return labels


# --- metrics


@dataclass(frozen=True, slots=True)
class SystemPredictions:
    """The input of a metric: one system's predictions of the same rows, one file for each seed.

    ``teacher_rationales`` are by row id (None or absent: no rationale for that row), as references
    for the rationales of others; it is None for the teacher, whose own are not measured.
    """

    task: Task
    files: Sequence[Scored]
    clusters: Clusters = None
    teacher_rationales: Mapping[str, str | None] | None = None

    def each_file(
        self, values: Callable[[Scored], Sequence[float] | NDArray[np.bool_]]
    ) -> RowValues:
        """(seeds, rows): ``values`` of each file."""
        return np.stack([np.asarray(values(file), dtype=np.float64) for file in self.files])


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A metric of a system, defined by ``row_values``, ``sums`` or ``aggregate``.

    Each returns None where the metric does not apply to the task or the predictions; the first that
    applies counts. The mean of ``row_values`` over rows is the metric's value; ``sums`` is for a
    function of sums over rows, such as F1, and ``aggregate`` for anything else. The first two have
    bootstrap intervals and paired tests.
    """

    title: str
    source: str  # the paper, or the definition in a sentence
    higher_is_better: bool | None  # None: neither
    of_rationales: bool = False
    is_fraction: bool = True  # shown in percent
    compares_systems: bool = False  # systems are compared by it as well, beside accuracy
    highest: Callable[[Task], float] = lambda _task: 1.0  # the largest value that a row can have
    row_values: Callable[[SystemPredictions], RowValues | None] | None = None
    sums: Callable[[SystemPredictions], RowSums | None] | None = None
    aggregate: Callable[[SystemPredictions], Measure | None] | None = None


@dataclass(slots=True)
class Measures:
    """All metrics of one system."""

    metrics: dict[str, Measure] = field(default_factory=dict)  # in the registry's order
    # of `Metric.compares_systems`
    compared: dict[str, RowValues | RowSums] = field(default_factory=dict)
    recall: dict[str, Measure] = field(default_factory=dict)  # by label that some row has
    confusions: list[Confusion] = field(default_factory=list)


def measure(predictions: SystemPredictions) -> Measures:
    """Compute every registered metric that applies."""
    measures = Measures(recall=recall(predictions), confusions=confusions(predictions))
    for name in METRICS:
        metric: Metric = entry(METRICS, name)
        values: RowValues | RowSums | None = None
        if metric.row_values is not None:
            values = metric.row_values(predictions)
        if values is None and metric.sums is not None:
            values = metric.sums(predictions)
        result = None
        if isinstance(values, RowSums):
            result = values.measure(predictions.clusters)
        elif values is not None:
            highest = metric.highest(predictions.task)
            result = mean_over_rows(values, predictions.clusters, highest)
        elif metric.aggregate is not None:
            result = metric.aggregate(predictions)
        if values is not None and metric.compares_systems:
            measures.compared[name] = values
        if result is not None:
            measures.metrics[name] = result
    return measures


def mean_over_rows(
    values: RowValues, clusters: Clusters = None, highest: float = 1.0
) -> Measure | None:
    """The mean over rows of the mean over seeds, of ``values`` (seeds, rows).

    Rows for which no seed has a value are left out; None if that leaves no rows.
    """
    defined = ~np.isnan(values).all(axis=0)
    if not defined.any():
        return None
    per_row = np.nanmean(values[:, defined], axis=0)
    if clusters is not None:
        clusters = clusters[defined]
    interval = mean_interval(per_row, clusters, highest=highest)
    return Measure(value=float(per_row.mean()), ci95=interval, n=len(per_row))


# --- exact match and equations


def _exact_match_raw(predictions: SystemPredictions) -> RowValues:
    def matches(file: Scored) -> list[bool]:
        pairs = zip(file.predictions, file.gold, strict=True)
        return [prediction.raw.strip() == gold for prediction, gold in pairs]

    return predictions.each_file(matches)


def _exact_match(predictions: SystemPredictions) -> RowValues:
    def matches(file: Scored) -> list[bool]:
        return [label == gold for label, gold in zip(file.labels, file.gold, strict=True)]

    return predictions.each_file(matches)


def _equation_string(predictions: SystemPredictions) -> RowValues | None:
    def matches(file: Scored) -> list[bool]:
        pairs = zip(file.predictions, file.gold, strict=True)
        return ["".join(p.raw.split()) == "".join(gold.split()) for p, gold in pairs]

    return predictions.each_file(matches) if predictions.task.is_equation else None


def _equation_value(predictions: SystemPredictions) -> RowValues | None:
    if not predictions.task.is_equation:
        return None
    return predictions.each_file(lambda file: file.correct)


def _parse_failure(predictions: SystemPredictions) -> RowValues | None:
    if not predictions.task.is_equation:
        return None
    return predictions.each_file(lambda file: [label is None for label in file.labels])


EXACT_MATCH_RAW = Metric(
    title="Exact match, raw text",
    source="as in the paper's code: the output's text is the gold label's",
    higher_is_better=True,
    row_values=_exact_match_raw,
)
EXACT_MATCH = Metric(
    title="Exact match",
    source="the label read from the output is the gold label, letter by letter",
    higher_is_better=True,
    row_values=_exact_match,
)
EQUATION_STRING = Metric(
    title="Equation, text",
    source="the output's text is the gold equation's, ignoring spaces",
    higher_is_better=True,
    row_values=_equation_string,
)
EQUATION_VALUE = Metric(
    title="Equation, value",
    source="Hsieh et al., 2023, section 4: values within 1e-4 of each other",
    higher_is_better=True,
    row_values=_equation_value,
)
PARSE_FAILURE = Metric(
    title="Unreadable outputs",
    source="share of outputs from which no label can be read",
    higher_is_better=False,
    row_values=_parse_failure,
)


# --- classes


def truth_and_predicted(
    predictions: SystemPredictions,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Class indices of the gold labels (rows,) and the predictions (seeds, rows).

    An unreadable prediction has the number of classes as its index.
    """
    index = {label: i for i, label in enumerate(predictions.task.labels or ())}
    truth = np.array([index[gold] for gold in predictions.files[0].gold])
    predicted = [
        [len(index) if label is None else index[label] for label in file.labels]
        for file in predictions.files
    ]
    return truth, np.array(predicted)


def recall(predictions: SystemPredictions) -> dict[str, Measure]:
    """The recall of each label of a closed set that some row has as its gold label."""
    labels = predictions.task.labels
    if not labels:
        return {}
    truth, predicted = truth_and_predicted(predictions)
    recalls = {}
    for i, label in enumerate(labels):
        is_label = truth == i
        clusters = predictions.clusters
        if clusters is not None:
            clusters = clusters[is_label]
        hits = (predicted[:, is_label] == i).astype(np.float64)
        result = mean_over_rows(hits, clusters)
        if result is not None:
            recalls[label] = result
    return recalls


def confusions(predictions: SystemPredictions) -> list[Confusion]:
    """The pairs of gold and predicted labels with the most errors; none for open labels."""
    labels = predictions.task.labels
    if not labels:
        return []
    truth, predicted = truth_and_predicted(predictions)
    counts: Counter[tuple[int, int]] = Counter()
    for row in predicted:
        is_error = (row != truth) & (row < len(labels))
        counts.update(zip(truth[is_error].tolist(), row[is_error].tolist(), strict=True))
    totals = Counter(truth.tolist())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [
        Confusion(
            gold=labels[gold],
            predicted=labels[other],
            rows=number / len(predicted),
            share=number / len(predicted) / totals[gold],
        )
        for (gold, other), number in ordered[:_MAX_CONFUSIONS]
    ]


def macro_f1(
    truth: NDArray[np.int64],
    predicted: NDArray[np.int64],
    num_classes: int,
    clusters: Clusters = None,
) -> Measure:
    """Macro-F1, averaged over seeds.

    ``truth`` (rows,) in [0, num_classes); ``predicted`` (seeds, rows) in [0, num_classes], where
    num_classes means unreadable. A class that is neither gold nor predicted has no F1 and is left
    out of the mean, as in every resample.
    """
    outcomes = np.vstack([truth[None], predicted])  # (1 + seeds, rows)
    hits = predicted == truth
    if hits.all() or not hits.any():
        # No spread to resample. Outcomes that did not occur become possible ones, so that
        # counts_interval can allow for exceptions.
        grids = np.meshgrid(np.unique(truth), np.arange(num_classes + 1), indexing="ij")
        gold, other = (grid.ravel() for grid in grids)
        outcomes = np.hstack(
            [outcomes, np.vstack([gold[None], np.tile(other, (len(predicted), 1))])]
        )
    kinds, kind_of_row = np.unique(outcomes, axis=1, return_inverse=True)
    num_kinds = kinds.shape[1]
    kind_of_row = kind_of_row.ravel()[: len(truth)]
    statistic = macro_f1_of_counts(kinds[0], kinds[1:], num_classes)
    counts = np.bincount(kind_of_row, minlength=num_kinds)
    interval = counts_interval(kind_of_row, statistic, clusters, num_kinds=num_kinds)
    return Measure(value=float(statistic(counts[None])[0]), ci95=interval, n=len(truth))


def macro_f1_of_counts(
    truth: NDArray[np.int64], predicted: NDArray[np.int64], num_classes: int
) -> Callable[[NDArray[np.float64] | NDArray[np.int64]], Floats]:
    """Macro-F1 as a function of how often each kind of row occurs.

    ``truth`` (kinds,), ``predicted`` (seeds, kinds). The function maps counts (resamples, kinds)
    to (resamples,).
    """
    classes = np.arange(num_classes)
    is_gold = (truth[:, None] == classes).astype(np.float64)  # (kinds, classes)
    is_predicted = (predicted[:, :, None] == classes).astype(np.float64)  # (seeds, kinds, classes)

    def statistic(counts: NDArray[np.float64] | NDArray[np.int64]) -> Floats:
        weights = counts.astype(np.float64)
        gold = weights @ is_gold
        per_seed = []
        for matches in is_predicted:
            occurrences = gold + weights @ matches  # rows that are both count twice, as F1 has it
            with np.errstate(invalid="ignore"):
                f1 = 2 * (weights @ (is_gold * matches)) / occurrences
            per_seed.append(np.nanmean(f1, axis=1))
        return np.asarray(np.mean(per_seed, axis=0))

    return statistic
