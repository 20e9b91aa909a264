"""Calibration: how well probabilities agree with what is right, and the metrics of it.

A system has a probability for its answer, or a distribution over the task's labels. Metrics that
need the distribution are defined where every prediction has one. Where a row has several labels,
they are means over the labels, of a distribution over yes and no each.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dsbs.evaluation.aggregates import RowValues
from dsbs.evaluation.bootstrap import Floats
from dsbs.evaluation.metrics import Metric, Scored, SystemPredictions
from dsbs.records.measures import Measure
from dsbs.records.results import Bin
from dsbs.students.calibration import (
    binned,
    brier_scores,
    calibration_error,
    log_losses,
    yes_and_no,
)

_Score = Callable[[Floats, NDArray[np.int64]], Floats]


def calibration_bins(predictions: SystemPredictions) -> list[Bin]:
    """Bins of the predictions of all seeds; empty where a prediction has no probability."""
    probabilities: list[float] = []
    for file in predictions.files:
        for prediction in file.predictions:
            if prediction.probability is None:
                return []
            probabilities.append(prediction.probability)
    correct = np.concatenate([file.correct for file in predictions.files])
    return binned(np.array(probabilities), correct)


def _ece(predictions: SystemPredictions) -> Measure | None:
    """The mean over seeds: pooled, one seed's overconfidence would hide another's doubts."""
    errors = []
    for file in predictions.files:
        bins = calibration_bins(replace(predictions, files=[file]))
        if not bins:
            return None
        errors.append(calibration_error(bins))
    return Measure(value=statistics.fmean(errors), n=len(predictions.files[0].rows))


ECE = Metric(
    title="Expected calibration error",
    source="Guo et al., 2017, equation 3: 10 bins of equal width",
    higher_is_better=False,
    aggregate=_ece,
)


# --- distributions over the labels


def distributions(file: Scored, labels: Sequence[str]) -> Floats | None:
    """(rows, labels), in [0, 1]; None where a prediction has none."""
    rows = []
    for prediction in file.predictions:
        if prediction.distribution is None:
            return None
        rows.append([prediction.distribution.get(label, 0.0) for label in labels])
    return np.array(rows)


def _over_choices(file: Scored) -> Floats | None:
    """(rows, choices of the row with most): the gold choice's share first, 0 past a row's last."""
    rows = []
    for prediction, gold in zip(file.predictions, file.gold, strict=True):
        if prediction.distribution is None:
            return None
        wrong = [share for label, share in prediction.distribution.items() if label != gold]
        rows.append([prediction.distribution.get(gold, 0.0), *wrong])
    width = max(map(len, rows))
    return np.array([row + [0.0] * (width - len(row)) for row in rows])


def _of_distributions(predictions: SystemPredictions, score: _Score) -> RowValues | None:
    """(seeds, rows): ``score`` of each file's distributions and its gold labels' indices."""
    task = predictions.task
    labels = list(task.head_labels)
    values = []
    for file in predictions.files:
        probabilities = _over_choices(file) if task.has_choices else distributions(file, labels)
        if probabilities is None:
            return None
        if task.has_several_labels:
            is_given = np.array([task.head_targets(label) for label in file.gold])
            each = score(yes_and_no(probabilities), 1 - is_given.ravel())
            values.append(each.reshape(is_given.shape).mean(axis=1))
            continue
        gold = np.zeros(len(file.gold), dtype=np.int64)
        if not task.has_choices:
            gold = np.array([labels.index(label) for label in file.gold])
        values.append(score(probabilities, gold))
    return np.stack(values)


def _log_loss(predictions: SystemPredictions) -> RowValues | None:
    return _of_distributions(predictions, log_losses)


def _brier(predictions: SystemPredictions) -> RowValues | None:
    return _of_distributions(predictions, brier_scores)


def _confidence_auroc(predictions: SystemPredictions) -> Measure | None:
    values = []
    for file in predictions.files:
        confidences = [prediction.probability for prediction in file.predictions]
        if None in confidences:
            return None
        value = auroc(np.array(confidences, dtype=np.float64), file.correct)
        if value is not None:
            values.append(value)
    if not values:
        return None
    return Measure(value=float(np.mean(values)), n=len(predictions.files[0].rows))


def auroc(scores: Floats, is_positive: NDArray[np.bool_]) -> float | None:
    """The chance that a positive's score is above a negative's, ties by half; None without both.

    The Mann-Whitney statistic divided by the number of pairs (Hanley and McNeil, 1982).
    """
    from scipy.stats import rankdata

    positives = int(is_positive.sum())
    negatives = len(is_positive) - positives
    if positives == 0 or negatives == 0:
        return None
    ranks = rankdata(scores)[is_positive].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * negatives))


LOG_LOSS = Metric(
    title="Log loss",
    source="mean negative log-probability of the gold label, in nats",
    higher_is_better=False,
    is_fraction=False,
    row_values=_log_loss,
)
BRIER = Metric(
    title="Brier score",
    source="Brier, 1950: mean squared error of the distribution over the labels, in [0, 2]",
    higher_is_better=False,
    is_fraction=False,
    row_values=_brier,
)
CONFIDENCE_AUROC = Metric(
    title="AUROC of confidence",
    source="the chance that a right answer has a higher probability than a wrong one",
    higher_is_better=True,
    aggregate=_confidence_auroc,
)
