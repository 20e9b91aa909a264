"""Metrics of rationales. None of them shows that a rationale is the reason for its label."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from dsbs.evaluation.aggregates import RowValues
from dsbs.evaluation.metrics import Metric, Scored, SystemPredictions
from dsbs.tasks.conclusion import concluded_label

_UNDEFINED = float("nan")
# In ASCII text the words of the rouge-score package, which ignores all other letters.
_WORD = re.compile(r"[^\W_]+")


def _explained(predictions: SystemPredictions) -> list[Scored]:
    """The files with rationales. Seeds that were predicted without rationales are left out."""
    if predictions.teacher_rationales is None:
        return []
    return [
        file
        for file in predictions.files
        if any(prediction.rationale is not None for prediction in file.predictions)
    ]


def _stacked(values: list[list[float]]) -> RowValues | None:
    """(seeds, rows), or None without a seed."""
    if not values:
        return None
    return np.array(values, dtype=np.float64)


# --- ROUGE-L


def _rouge_l(predictions: SystemPredictions) -> RowValues | None:
    references = {
        row_id: words(text)
        for row_id, text in (predictions.teacher_rationales or {}).items()
        if text
    }

    def value(row_id: str, rationale: str | None) -> float:
        reference = references.get(row_id)
        if not reference:
            return _UNDEFINED
        return rouge_l(words(rationale or ""), reference)

    return _stacked(
        [
            [value(row.id, p.rationale) for row, p in zip(file.rows, file.predictions, strict=True)]
            for file in _explained(predictions)
        ]
    )


def rouge_l(candidate: Sequence[str], reference: Sequence[str]) -> float:
    """ROUGE-L's F1 (Lin, 2004) of two lists of words, equal to the rouge-score package's.

    That package's own loop over words takes 80 times as long.
    """
    from rapidfuzz.distance import LCSseq

    if not candidate or not reference:
        return 0.0
    return 2 * LCSseq.similarity(candidate, reference) / (len(candidate) + len(reference))


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


ROUGE_L = Metric(
    title="ROUGE-L against the teacher's rationale",
    source="Lin, 2004: F1 of the longest common subsequence of words; measures similar wording, "
    "secondary to all other metrics",
    higher_is_better=True,
    of_rationales=True,
    compares_systems=True,
    row_values=_rouge_l,
)


# --- empty and truncated rationales


def _empty(predictions: SystemPredictions) -> RowValues | None:
    return _stacked(
        [
            [not (prediction.rationale or "").strip() for prediction in file.predictions]
            for file in _explained(predictions)
        ]
    )


def _truncated(predictions: SystemPredictions) -> RowValues | None:
    def value(truncated: bool | None) -> float:
        return _UNDEFINED if truncated is None else truncated

    return _stacked(
        [
            [value(prediction.rationale_truncated) for prediction in file.predictions]
            for file in _explained(predictions)
        ]
    )


RATIONALE_EMPTY = Metric(
    title="Empty rationales",
    source="share of rationales without a word",
    higher_is_better=False,
    of_rationales=True,
    row_values=_empty,
)
RATIONALE_TRUNCATED = Metric(
    title="Truncated rationales",
    source="share of rationales that were cut off by their token limit",
    higher_is_better=False,
    of_rationales=True,
    row_values=_truncated,
)


# --- consistency


def _consistency(predictions: SystemPredictions) -> RowValues | None:
    task = predictions.task

    def file_values(file: Scored) -> list[float]:
        values: list[float] = []
        for row, prediction, label in zip(file.rows, file.predictions, file.labels, strict=True):
            conclusion = concluded_label(prediction.rationale or "", task, row.input)
            if conclusion is None:
                values.append(_UNDEFINED)
            else:
                values.append(label is not None and task.correct(conclusion, label))
        return values

    return _stacked([file_values(file) for file in _explained(predictions)])


CONSISTENCY = Metric(
    title="Rationale and label agree",
    source="of the rationales that state a conclusion, the share that states the predicted label",
    higher_is_better=True,
    of_rationales=True,
    row_values=_consistency,
)
