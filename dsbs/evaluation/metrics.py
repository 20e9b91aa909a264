"""Metrics of labels. Rows are the units: what seeds say of a row is averaged before rows are resampled.

Every name is described in ``dsbs.records.results.METRICS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbs.evaluation.bootstrap import Clusters, Floats
from dsbs.evaluation.score import Scored
from dsbs.evaluation.stats import counts_interval, mean_interval
from dsbs.records.results import METRICS, Bin, Measure
from dsbs.tasks.base import Task

EXACT_MATCH_RAW = METRICS["exact_match_raw"]
EXACT_MATCH = METRICS["exact_match"]
EQUATION_STRING = METRICS["equation_string"]
EQUATION_VALUE = METRICS["equation_value"]
PARSE_FAILURE = METRICS["parse_failure"]
MACRO_F1 = METRICS["macro_f1"]
ECE = METRICS["ece"]
ROUGE_L = METRICS["rouge_l"]
RATIONALE_EMPTY = METRICS["rationale_empty"]
RATIONALE_TRUNCATED = METRICS["rationale_truncated"]
CONSISTENCY = METRICS["consistency"]

BINS = 10  # Guo et al. (2017) use 15 on 10,000 rows and more; a test set of some hundred fills ten


@dataclass(frozen=True, slots=True)
class Measures:
    metrics: dict[str, Measure]
    recall: dict[str, Measure]  # of each label of a closed set that is some row's gold one
    calibration: list[Bin]  # empty where not every prediction has a probability


def measures(task: Task, files: Sequence[Scored], clusters: Clusters = None) -> Measures:
    """All metrics of one system; ``files`` are its seeds' predictions of the same rows."""
    rows = files[0].rows
    found: dict[str, Measure] = {}

    def share(name: str, told: Callable[[Scored], Sequence[bool] | NDArray[np.bool_]]) -> None:
        measure = mean_over_rows(
            [np.asarray(told(file), dtype=np.float64) for file in files], clusters
        )
        assert measure is not None  # every row is told of
        found[name] = measure

    gold = [str(row.label) for row in rows]
    share(
        "exact_match_raw",
        lambda f: [p.raw.strip() == g for p, g in zip(f.predictions, gold, strict=True)],
    )
    share("exact_match", lambda f: [label == g for label, g in zip(f.labels, gold, strict=True)])
    if task.is_equation:
        joined = ["".join(g.split()) for g in gold]
        share(
            "equation_string",
            lambda f: [
                "".join(p.raw.split()) == g for p, g in zip(f.predictions, joined, strict=True)
            ],
        )
        share("equation_value", lambda f: f.correct)
        share("parse_failure", lambda f: [label is None for label in f.labels])
    recall: dict[str, Measure] = {}
    if task.labels:
        number = {label: i for i, label in enumerate(task.labels)}
        truth = np.array([number[g] for g in gold])
        read = np.array(
            [
                [len(number) if label is None else number[label] for label in file.labels]
                for file in files
            ]
        )
        found["macro_f1"] = macro_f1(truth, read, len(number), clusters)
        for label, i in number.items():
            its = truth == i
            one = mean_over_rows(
                (read[:, its] == i).astype(np.float64), None if clusters is None else clusters[its]
            )
            if one is not None:
                recall[label] = one
    probabilities = [
        p.probability for file in files for p in file.predictions if p.probability is not None
    ]
    bins: list[Bin] = []
    if len(probabilities) == len(files) * len(rows):
        bins = calibration(
            np.array(probabilities), np.concatenate([file.correct for file in files])
        )
        found["ece"] = Measure(value=calibration_error(bins), n=len(rows))
    return Measures(found, recall, bins)


def mean_over_rows(values: Sequence[Floats] | Floats, clusters: Clusters = None) -> Measure | None:
    """The mean over rows of the mean over seeds. values (seeds, rows), NaN where a seed says nothing of a row.

    Rows that no seed speaks of are left out; None where that leaves none.
    """
    stacked = np.asarray(values, dtype=np.float64)
    told = ~np.isnan(stacked).all(axis=0)
    if not told.any():
        return None
    per_row = np.nanmean(stacked[:, told], axis=0)
    interval = mean_interval(per_row, None if clusters is None else clusters[told])
    return Measure(value=float(per_row.mean()), ci95=interval, n=len(per_row))


def macro_f1(
    truth: NDArray[np.int64], read: NDArray[np.int64], classes: int, clusters: Clusters = None
) -> Measure:
    """The mean over seeds of macro-F1. truth (rows,) in [0, classes), read (seeds, rows) in [0, classes]: the last is none.

    A class that is neither gold nor predicted has no F1 and is left out of the mean, here as in every resample.
    """
    from sklearn.metrics import f1_score

    known = list(range(classes))
    per_seed = [
        np.nanmean(f1_score(truth, one, labels=known, average=None, zero_division=np.nan))
        for one in read
    ]
    seen = np.vstack([truth[None], read])  # (1 + seeds, rows)
    hits = read == truth
    if hits.all() or not hits.any():  # no spread: what a row could have been leaves room for some
        gold, said = (
            grid.ravel()
            for grid in np.meshgrid(np.unique(truth), np.arange(classes + 1), indexing="ij")
        )
        seen = np.hstack([seen, np.vstack([gold[None], np.tile(said, (len(read), 1))])])
    outcomes, kinds = np.unique(seen, axis=1, return_inverse=True)
    statistic = macro_f1_of_counts(outcomes[0], outcomes[1:], classes)
    interval = counts_interval(
        kinds.ravel()[: len(truth)], statistic, clusters, cells=outcomes.shape[1]
    )
    return Measure(value=float(np.mean(per_seed)), ci95=interval, n=len(truth))


def macro_f1_of_counts(
    truth: NDArray[np.int64], read: NDArray[np.int64], classes: int
) -> Callable[[NDArray[Any]], NDArray[np.float64]]:
    """Macro-F1 as a function of how often each kind of row occurs. truth (kinds,), read (seeds, kinds).

    The function takes counts (resamples, kinds) and gives (resamples,).
    """
    is_gold = (truth[:, None] == np.arange(classes)).astype(np.float64)  # (kinds, classes)
    is_read = (read[:, :, None] == np.arange(classes)).astype(np.float64)  # (seeds, kinds, classes)

    def statistic(counts: NDArray[Any]) -> NDArray[np.float64]:
        times = counts.astype(np.float64)
        gold = times @ is_gold
        per_seed = []
        for one in is_read:
            occurs = gold + times @ one  # gold or predicted, twice where it is both
            with np.errstate(invalid="ignore"):
                f1 = 2 * (times @ (is_gold * one)) / occurs
            per_seed.append(np.nanmean(f1, axis=1))
        return np.asarray(np.mean(per_seed, axis=0))

    return statistic


def calibration(probabilities: Floats, right: NDArray[np.bool_]) -> list[Bin]:
    """Ten bins (low, high] of equal width; those without a prediction are left out. probabilities, right (predictions,)."""
    edges = np.arange(1, BINS) / BINS
    at = np.searchsorted(edges, probabilities, side="left")  # 0 belongs to the first bin, too
    return [
        Bin(
            low=i / BINS,
            high=(i + 1) / BINS,
            n=int((at == i).sum()),
            confidence=float(probabilities[at == i].mean()),
            accuracy=float(right[at == i].mean()),
        )
        for i in np.unique(at).tolist()
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: the mean over predictions of |accuracy - confidence| of their bin (Guo et al., 2017)."""
    return sum(one.n * abs(one.accuracy - one.confidence) for one in bins) / sum(
        one.n for one in bins
    )
