"""Metrics of labels that consist of parts: the possible labels of a row, or the fields of a text.

A part is found where prediction and gold label both have it, with the same value. An unreadable
output has no part, and all its parts are wrong.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsbs.evaluation.aggregates import RowSums, RowValues, Statistic, interval_of
from dsbs.evaluation.bootstrap import Clusters, Floats
from dsbs.evaluation.calibration import auroc
from dsbs.evaluation.metrics import (
    Metric,
    SystemPredictions,
    macro_f1,
    mean_over_rows,
    truth_and_predicted,
)
from dsbs.records.measures import Measure
from dsbs.records.results import PartResult
from dsbs.students.calibration import binned, calibration_error
from dsbs.tasks import Task


@dataclass(frozen=True, slots=True)
class _Outcomes:
    """What became of each part."""

    gold: NDArray[np.bool_]
    """(rows, parts): whether the gold label has it."""
    predicted: NDArray[np.bool_]
    """(seeds, rows, parts): whether the prediction has it."""
    right: NDArray[np.bool_]
    """(seeds, rows, parts): whether both have the same value, or neither has one."""

    @property
    def counts(self) -> Floats:
        """(3, rows, parts): found, predicted and gold parts, as means over seeds."""
        hits = (self.right & self.gold).mean(axis=0)
        return np.stack([hits, self.predicted.mean(axis=0), self.gold.astype(np.float64)])


def _outcomes(predictions: SystemPredictions) -> _Outcomes | None:
    """None: the task's labels have no parts."""
    if not predictions.task.part_names:
        return None
    coded = _CodedParts(predictions.task)
    gold = coded.of(predictions.files[0].gold)
    predicted = np.stack([coded.of(file.labels) for file in predictions.files])
    return _Outcomes(gold > 0, predicted > 0, predicted == gold)


class _CodedParts:
    """The parts of labels as numbers: equal ones mean the same, 0 is absent, -1 unreadable."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._numbers: list[dict[Hashable, int]] = [{None: 0} for _ in task.part_names]
        self._cache: dict[str | None, list[int]] = {None: [-1] * len(task.part_names)}

    def of(self, labels: list[str] | list[str | None]) -> NDArray[np.int64]:
        """(rows, parts)"""
        return np.array([self._codes(label) for label in labels])

    def _codes(self, label: str | None) -> list[int]:
        if label not in self._cache:
            assert label is not None
            parts = self._task.parts(label).items()
            keys = [self._task.part_key(name, value) for name, value in parts]
            pairs = zip(self._numbers, keys, strict=True)
            self._cache[label] = [numbers.setdefault(key, len(numbers)) for numbers, key in pairs]
        return self._cache[label]


# --- all parts together


def _precision(sums: Floats) -> Floats:
    return np.asarray(sums[:, 0] / sums[:, 1])


def _recall(sums: Floats) -> Floats:
    return np.asarray(sums[:, 0] / sums[:, 2])


def _f1(sums: Floats) -> Floats:
    return np.asarray(2 * sums[:, 0] / (sums[:, 1] + sums[:, 2]))


def _micro_sums(predictions: SystemPredictions, statistic: Statistic) -> RowSums | None:
    """Found, predicted and gold parts of each row, (rows, 3)."""
    outcomes = _outcomes(predictions)
    if outcomes is None:
        return None
    return RowSums.of(outcomes.counts.sum(axis=2).T, statistic)


def _macro_f1_of_parts(predictions: SystemPredictions) -> RowSums | None:
    outcomes = _outcomes(predictions)
    if outcomes is None or not predictions.task.has_several_labels:
        return None
    counts = outcomes.counts
    num_parts = counts.shape[2]

    def statistic(sums: Floats) -> Floats:
        hits, predicted, gold = np.split(sums, 3, axis=1)
        occurs = predicted + gold > 0
        f1 = np.where(occurs, 2 * hits / (predicted + gold), 0.0)
        return np.asarray(f1.sum(axis=1) / occurs.sum(axis=1))

    return RowSums.of(counts.transpose(1, 0, 2).reshape(-1, 3 * num_parts), statistic)


def _macro_f1_of_classes(predictions: SystemPredictions) -> Measure | None:
    labels = predictions.task.labels
    if not labels:
        return None
    return macro_f1(*truth_and_predicted(predictions), len(labels), predictions.clusters)


def _hamming(predictions: SystemPredictions) -> RowValues | None:
    outcomes = _outcomes(predictions)
    return None if outcomes is None else 1 - outcomes.right.mean(axis=2)


def _not_in_input(predictions: SystemPredictions) -> RowValues | None:
    task = predictions.task
    if not task.checks_input:
        return None
    return predictions.each_file(
        lambda file: [
            np.nan if label is None else bool(task.not_in_input(label, row.input))
            for row, label in zip(file.rows, file.labels, strict=True)
        ]
    )


MICRO_F1 = Metric(
    title="Micro-F1",
    source="F1 of all labels, or filled fields, of all rows together",
    higher_is_better=True,
    compares_systems=True,
    sums=lambda predictions: _micro_sums(predictions, _f1),
)
MICRO_PRECISION = Metric(
    title="Precision",
    source="share of the predicted labels, or filled fields, that the gold label has as well",
    higher_is_better=True,
    compares_systems=True,
    sums=lambda predictions: _micro_sums(predictions, _precision),
)
MICRO_RECALL = Metric(
    title="Recall",
    source="share of the gold labels, or filled fields, that are predicted",
    higher_is_better=True,
    compares_systems=True,
    sums=lambda predictions: _micro_sums(predictions, _recall),
)
MACRO_F1 = Metric(
    title="Macro-F1",
    source="mean F1 of the classes that are gold or predicted in some row (scikit-learn)",
    higher_is_better=True,
    compares_systems=True,
    sums=_macro_f1_of_parts,
    aggregate=_macro_f1_of_classes,
)
HAMMING = Metric(
    title="Hamming loss",
    source="share of wrong labels, or fields: wrongly predicted, absent or of another value",
    higher_is_better=False,
    compares_systems=True,
    row_values=_hamming,
)
NOT_IN_INPUT = Metric(
    title="Not in the input",
    source="share of the readable answers with a value that must occur in the input and does not",
    higher_is_better=False,
    row_values=_not_in_input,
)


# --- each part by itself


def part_results(predictions: SystemPredictions) -> dict[str, PartResult]:
    """By part; empty where labels have none."""
    outcomes = _outcomes(predictions)
    if outcomes is None:
        return {}
    counts = outcomes.counts
    names = predictions.task.part_names
    measures = _measures_of_parts(counts, predictions.clusters)
    results = {}
    for i, name in enumerate(names):
        right = mean_over_rows(outcomes.right[:, :, i].astype(np.float64), predictions.clusters)
        assert right is not None  # there are rows
        precision, recall, f1 = (measures[kind][i] for kind in range(3))
        results[name] = PartResult(
            accuracy=right,
            precision=precision,
            recall=recall,
            f1=f1,
            gold=int(outcomes.gold[:, i].sum()),
            predicted=float(counts[1, :, i].sum()),
            **_confidence_of_part(predictions, name, outcomes.right[:, :, i]),
        )
    return results


def _confidence_of_part(
    predictions: SystemPredictions, name: str, right: NDArray[np.bool_]
) -> dict[str, Measure | None]:
    """How well a field's probabilities agree with what is right, (seeds, rows)."""
    rows, errors, aurocs = [], [], []
    for file, right_of_seed in zip(predictions.files, right, strict=True):
        pairs = [
            (shares[name], bool(correct))
            for prediction, correct in zip(file.predictions, right_of_seed, strict=True)
            if name in (shares := prediction.field_probabilities or {})
        ]
        if not pairs:
            return {}
        of_rows = np.array([share for share, _ in pairs])
        correct_rows = np.array([correct for _, correct in pairs])
        rows.append(len(pairs))
        errors.append(calibration_error(binned(of_rows, correct_rows)))
        aurocs.append(auroc(of_rows, correct_rows))
    of_seeds = [value for value in aurocs if value is not None]
    n = min(rows)
    return {
        "ece": Measure(value=float(np.mean(errors)), n=n),
        "confidence_auroc": Measure(value=float(np.mean(of_seeds)), n=n) if of_seeds else None,
    }


def _measures_of_parts(counts: Floats, clusters: Clusters) -> list[list[Measure | None]]:
    """Precision, recall and F1 of each part, with intervals; the same resamples for all.

    ``counts`` as `_Outcomes.counts`.
    """
    num_parts = counts.shape[2]

    def statistic(sums: Floats) -> Floats:
        by_count = sums.reshape(-1, 3, num_parts)
        return np.concatenate([f(by_count) for f in (_precision, _recall, _f1)], axis=1)

    sums = RowSums.of(counts.transpose(1, 0, 2).reshape(-1, 3 * num_parts), statistic)
    values = sums.value.reshape(3, num_parts)
    resamples = sums.resamples(clusters).reshape(-1, 3, num_parts)
    has_value = np.stack([counts[1] > 0, counts[2] > 0, counts[1] + counts[2] > 0])
    measures: list[list[Measure | None]] = []
    for kind in range(3):
        row: list[Measure | None] = []
        for i in range(num_parts):
            is_defined = has_value[kind, :, i]
            if not is_defined.any():
                row.append(None)
                continue
            value = float(values[kind, i])
            num_rows = int(is_defined.sum())
            units = num_rows
            if clusters is not None:
                units = len(np.unique(clusters[is_defined]))
            interval = interval_of(value, resamples[:, kind, i], units, 0.0, 1.0)
            row.append(Measure(value=value, ci95=interval, n=num_rows))
        measures.append(row)
    return measures
