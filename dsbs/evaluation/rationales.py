"""Metrics of rationales. None of them says that a rationale is why the label was given.

Every name is described in ``dsbs.records.results.METRICS``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dsbs.evaluation.bootstrap import Clusters
from dsbs.evaluation.metrics import mean_over_rows
from dsbs.evaluation.score import Scored
from dsbs.records.results import Measure
from dsbs.records.rows import Example, Prediction
from dsbs.tasks.base import Task, concluded_label

NAMES = ("rouge_l", "rationale_empty", "rationale_truncated", "consistency")
_WORD = re.compile(
    r"[^\W_]+"
)  # of ASCII text the words of the rouge-score package, which knows no other letters
_UNTOLD = float("nan")


GRADED = ("rouge_l",)  # of which systems are compared by more than right and wrong
Values = NDArray[np.float64]  # (seeds, rows), NaN where a row says nothing


def rationale_measures(
    values: Mapping[str, Values], clusters: Clusters = None
) -> dict[str, Measure]:
    """Metrics of one system's rationales, from ``rationale_values``."""
    found = {name: mean_over_rows(one, clusters) for name, one in values.items()}
    return {name: measure for name, measure in found.items() if measure is not None}


def rationale_values(
    task: Task, files: Sequence[Scored], references: Mapping[str, str | None]
) -> dict[str, Values]:
    """Each metric's values; ``files`` are a system's predictions of the same rows by its seeds.

    ``references`` are the teacher's rationales by id (None or absent: it has none for that row). Files without a single
    rationale were predicted without and are left out; where that leaves none, the answer is empty.
    """
    files = [file for file in files if any(p.rationale is not None for p in file.predictions)]
    if not files:
        return {}
    words = {key: _words(text) for key, text in references.items() if text}
    values = np.array(
        [
            [
                _of_row(task, *one, words.get(one[0].id))
                for one in zip(file.rows, file.predictions, file.labels, strict=True)
            ]
            for file in files
        ]
    )
    return {name: values[:, :, i].astype(np.float64) for i, name in enumerate(NAMES)}


def _of_row(
    task: Task, row: Example, given: Prediction, label: str | None, reference: list[str] | None
) -> tuple[float, float, float, float]:
    """A row's values, in the order of NAMES."""
    rationale = given.rationale or ""
    claim = concluded_label(rationale, task, row.input)
    return (
        _UNTOLD if not reference else rouge_l(_words(rationale), reference),
        not rationale.strip(),
        _UNTOLD if given.rationale_truncated is None else given.rationale_truncated,
        _UNTOLD if claim is None else label is not None and task.correct(claim, label),
    )


def rouge_l(candidate: Sequence[str], reference: Sequence[str]) -> float:
    """ROUGE-L's F1 (Lin, 2004): of the longest common subsequence of two lists of words, as the rouge-score package has it.

    That package's own loop over words takes eighty times as long.
    """
    from rapidfuzz.distance import LCSseq

    if not candidate or not reference:
        return 0.0
    return 2 * LCSseq.similarity(candidate, reference) / (len(candidate) + len(reference))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
