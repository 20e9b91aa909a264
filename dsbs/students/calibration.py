"""Calibration of a student: its temperature, the confidence of an answer, and their records.

A temperature T divides the logits (Guo et al., 2017), so that a distribution p becomes p^(1/T),
normalized. The order of the labels, and with it the accuracy, stays as it is. Where a row has
several labels or fields, each one's probability and its rest are such a distribution.
``calibration.json`` and ``threshold.json`` are beside the student.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dsbs.errors import UserError
from dsbs.files import write_json
from dsbs.records.measures import ResultRecord
from dsbs.records.results import Bin
from dsbs.tasks import Fields, Task
from dsbs.tasks.conclusion import concluded_label

CALIBRATION, THRESHOLD = "calibration.json", "threshold.json"
# probability: of the likeliest label; margin: the difference to the second; entropy: 1 minus the
# entropy divided by that of equally likely labels; views: first whether the written rationale
# states the same label, then the probability.
ConfidenceKind = Literal["probability", "margin", "entropy", "views"]
_OF_DISTRIBUTIONS: tuple[ConfidenceKind, ...] = ("probability", "margin", "entropy")
NUM_BINS = 10  # Guo et al. (2017) use 15 for 10,000 rows and more; some hundred rows fill ten
Floats = NDArray[np.float64]
_Values = TypeVar("_Values", float, Floats)
_Record = TypeVar("_Record", bound=ResultRecord)
_SMALLEST = 1e-12  # a probability that counts in a loss
# Limits of the temperature, so that a student that is right on every row does not become certain.
_LOWEST, _HIGHEST = 0.2, 10.0


class CalibrationQuality(ResultRecord):
    """How well the distributions agree with the labels of some rows."""

    ece: float
    """Expected calibration error, in ten bins of equal width."""
    brier: float
    log_loss: float
    """In nats."""


class LabelThresholds(ResultRecord):
    """The smallest probability with which each label is given, chosen on these rows."""

    precision: float | None
    """The precision that each label has at least. None: the highest F1."""
    values: dict[str, float | None]
    """By label, in [0, 1]. None: the label is never given, as no threshold has that precision."""


class Calibration(ResultRecord):
    """``calibration.json``.

    Of several labels or fields, ``before`` and ``after`` are means over rows and labels.
    """

    schema_: Literal["dsbs.calibration/1"] = Field("dsbs.calibration/1", alias="schema")
    temperature: float = Field(gt=0)
    rows: int
    """The validation rows that it was fitted on."""
    labels: str
    """Whose labels these rows have: gold or teacher."""
    before: CalibrationQuality
    """With temperature 1."""
    after: CalibrationQuality
    confidence: ConfidenceKind
    """The kind with the lowest area under the risk-coverage curve on these rows."""
    aurc: dict[ConfidenceKind, float]
    """That area, by kind."""
    label_thresholds: LabelThresholds | None = Field(None, exclude_if=lambda value: value is None)
    """Of a label head whose rows have several labels. None: of another student."""


class Threshold(ResultRecord):
    """``threshold.json``: when the student answers and when it asks its teacher.

    The student answers where the confidence is at least ``threshold``.
    """

    schema_: Literal["dsbs.threshold/1"] = Field("dsbs.threshold/1", alias="schema")
    student: str
    """Fingerprint of the student."""
    scores_labels: bool = False
    """Whether the labels of a student that writes its label are scored (``eval.score_labels``)."""
    confidence: ConfidenceKind
    temperature: float
    label_thresholds: LabelThresholds | None = Field(None, exclude_if=lambda value: value is None)
    threshold: float | None
    """None: no threshold holds, and the teacher answers everything."""
    of: Literal["agreement", "accuracy"]
    target: float | None
    """The smallest share that is acceptable. None: of ``accuracy``, with a margin."""
    margin: float | None = None
    """Of ``accuracy``: the largest acceptable loss against the teacher alone."""
    level: float
    """The confidence level of the bound."""
    bound: float | None
    """The share that the calibration rows guarantee at this level, or the loss for a margin."""
    rows: int
    """The calibration rows."""
    coverage: float
    """The share of the calibration rows that the student answers."""

    def is_sure(self, confidence: float | None) -> bool:
        """Whether the student answers; None: an unreadable label, or an unknown confidence."""
        if self.threshold is None or confidence is None:
            return False
        return confidence >= self.threshold


def read_calibration(folder: str | Path) -> Calibration | None:
    """The calibration of a student; None: it has none. Raises UserError for another content."""
    hint = "remove it: the student's probabilities are then uncalibrated"
    return _read(Path(folder) / CALIBRATION, Calibration, hint)


def read_threshold(folder: str | Path) -> Threshold | None:
    """The threshold of a student; None: it has none. Raises UserError for another content."""
    hint = "set eval.cascade and run `dsbs eval` again"
    return _read(Path(folder) / THRESHOLD, Threshold, hint)


def _read(path: Path, record: type[_Record], hint: str) -> _Record | None:
    try:
        return record.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(
            f"{path} is not a {record.__name__.lower()} of a student", hint=hint
        ) from None


def write_record(folder: str | Path, record: Calibration | Threshold) -> None:
    """Write the record's file into a student's folder."""
    name = CALIBRATION if isinstance(record, Calibration) else THRESHOLD
    write_json(Path(folder) / name, record.model_dump(mode="json", by_alias=True))


# --- answers


def tempered(distribution: Sequence[float], temperature: float) -> tuple[float, ...]:
    """The distribution of the logits divided by ``temperature``."""
    if temperature == 1:
        return tuple(distribution)
    highest = max(distribution)
    shares = [(share / highest) ** (1 / temperature) for share in distribution]
    total = math.fsum(shares)
    return tuple(share / total for share in shares)


def tempered_each(shares: Sequence[float], temperature: float) -> tuple[float, ...]:
    """The probability of each of several labels, with its logit divided by ``temperature``."""
    return tuple(tempered((share, 1 - share), temperature)[0] for share in shares)


def confidence_of(
    kind: ConfidenceKind,
    probability: float | None,
    distribution: Mapping[str, float] | None,
    agreement: float | None = None,
) -> float | None:
    """The confidence of an answer, in [0, 1]; the larger, the surer.

    ``probability`` is that of the answer, and all that counts without a distribution;
    ``agreement`` is that of `rationale_agreement`, for the kind views. None: it is unknown.
    """
    if kind == "views":
        if probability is None or agreement is None:
            return None
        return _confidence_of_views(probability, agreement)
    if distribution is None or kind == "probability":
        return probability
    if len(distribution) < 2:
        return 1.0
    shares = [short_share(share) for share in distribution.values()]
    return float(confidences(kind, np.array([shares]))[0])


def short_share(share: float) -> float:
    """A probability with the digits that prediction files have, on which thresholds are chosen."""
    return float(f"{share:.6g}")


def rationale_agreement(label: str, rationale: str, task: Task, fields: Fields) -> float:
    """1 where a rationale concludes with ``label``, 0 where it does with another one, else 0.5."""
    concluded = concluded_label(rationale, task, fields)
    if concluded is None:
        return 0.5
    return float(task.correct(concluded, label))


def _confidence_of_views(probability: _Values, agreement: _Values) -> _Values:
    """In [0, 1]: the agreement first, and the probability among equal ones."""
    return (probability + 2 * agreement) / 3


def confidences(kind: ConfidenceKind, distributions: Floats) -> Floats:
    """(rows, labels) -> (rows,), in [0, 1]. A label that a row does not have has probability 0."""
    if kind == "entropy":
        logs = np.log(np.maximum(distributions, _SMALLEST))
        entropy = -(distributions * logs).sum(axis=1)
        certainty = 1 - entropy / math.log(distributions.shape[1])
        return np.asarray(np.clip(certainty, 0.0, 1.0), dtype=np.float64)
    largest = np.sort(distributions, axis=1)[:, ::-1]
    if kind == "margin":
        return np.asarray(largest[:, 0] - largest[:, 1])
    return np.asarray(largest[:, 0])


# --- fitting


def calibrate(
    distributions: Sequence[Sequence[float]],
    classes: Sequence[int],
    labels: str,
    agreements: Sequence[float] | None = None,
    choose: Callable[[Sequence[float]], int] | None = None,
) -> Calibration:
    """Fit a temperature on validation rows, and choose the kind of confidence.

    ``distributions`` may differ in their number of labels; ``classes`` are the right ones' indices,
    and ``labels`` says whose they are. ``agreements``: each row's `rationale_agreement`; None: no
    rationales were written. ``choose``: the index of a distribution's answer. None: the likeliest.
    """
    shares = np.zeros((len(classes), max(map(len, distributions))))
    for row, distribution in zip(shares, distributions, strict=True):
        row[: len(distribution)] = distribution
    gold = np.asarray(classes)
    temperature = fit_temperature(shares, gold)
    after = _tempered_rows(shares, temperature)
    answers = _answers(after, choose)
    is_wrong = (answers != gold).astype(np.float64)
    probability = after[np.arange(len(gold)), answers]
    aurc = {kind: area_under_risk(confidences(kind, after), is_wrong) for kind in _OF_DISTRIBUTIONS}
    aurc["probability"] = area_under_risk(probability, is_wrong)
    if agreements is not None:
        of_views = _confidence_of_views(probability, np.asarray(agreements))
        aurc["views"] = area_under_risk(of_views, is_wrong)
    return Calibration(
        temperature=temperature,
        rows=len(gold),
        labels=labels,
        before=_quality(shares, gold, _answers(shares, choose)),
        after=_quality(after, gold, answers),
        confidence=min(aurc, key=lambda kind: round(aurc[kind], 9)),
        aurc=aurc,
    )


def _answers(
    distributions: Floats, choose: Callable[[Sequence[float]], int] | None
) -> NDArray[np.int64]:
    """The index of each row's answer."""
    if choose is None:
        return np.asarray(distributions.argmax(axis=1), dtype=np.int64)
    return np.array([choose(row) for row in distributions.tolist()], dtype=np.int64)


def calibrate_each(
    shares: Floats,
    has_label: NDArray[np.bool_],
    labels: str,
    names: Sequence[str] | None,
    *,
    precision: float | None = None,
    agreements: Sequence[float] | None = None,
) -> Calibration:
    """`calibrate` for rows with several labels: one temperature, and a threshold for each label.

    ``shares`` (rows, L): probabilities of the labels ``names``; ``has_label`` (rows, L): whether a
    row has each. The temperature is fitted on the summed binary log loss; `best_threshold`.
    ``names`` None: the probabilities that the values of fields are right, all of which are given.
    """
    pairs = yes_and_no(shares)
    right = np.where(has_label, 0, 1).ravel()
    temperature = fit_temperature(pairs, right)
    after = _tempered_rows(pairs, temperature)
    probabilities = after[:, 0].reshape(shares.shape)
    thresholds: list[float | None] = [0.0] * shares.shape[1]
    label_thresholds = None
    if names is not None:
        columns = zip(probabilities.T, has_label.T, strict=True)
        thresholds = [best_threshold(*pair, precision) for pair in columns]
        by_label = dict(zip(names, thresholds, strict=True))
        label_thresholds = LabelThresholds(precision=precision, values=by_label)
    limits = [math.inf if threshold is None else threshold for threshold in thresholds]
    chosen = probabilities >= np.array(limits)
    is_wrong = (chosen != has_label).any(axis=1).astype(np.float64)
    probability = np.where(chosen, probabilities, 1 - probabilities).min(axis=1)
    aurc: dict[ConfidenceKind, float] = {"probability": area_under_risk(probability, is_wrong)}
    if agreements is not None:
        of_views = _confidence_of_views(probability, np.asarray(agreements))
        aurc["views"] = area_under_risk(of_views, is_wrong)
    return Calibration(
        temperature=temperature,
        rows=len(shares),
        labels=labels,
        before=_quality(pairs, right, pairs.argmax(axis=1)),
        after=_quality(after, right, after.argmax(axis=1)),
        confidence=min(aurc, key=lambda kind: round(aurc[kind], 9)),
        aurc=aurc,
        label_thresholds=label_thresholds,
    )


def yes_and_no(shares: Floats) -> Floats:
    """Probabilities of several labels (rows, L) -> (rows * L, 2): of having each, and of not."""
    return np.stack([shares, 1 - shares], axis=-1).reshape(-1, 2)


def best_threshold(
    probabilities: Floats, is_given: NDArray[np.bool_], precision: float | None
) -> float | None:
    """The smallest probability with which a label is given, midway between two rows'; both (rows,).

    With ``precision``, that of the most right rows among those with at least this precision; None
    where there are none. Without, that of the highest F1 (Lipton et al., 2014, arXiv:1402.1892),
    the nearest to 0.5 of equally good ones; 0.5 where no row has the label.
    """
    positives = int(is_given.sum())
    if positives == 0:
        return 0.5 if precision is None else None
    order = np.argsort(-probabilities, kind="stable")
    values = probabilities[order]
    is_last = np.append(values[1:] != values[:-1], True)  # equal rows are given the label together
    rows = np.flatnonzero(is_last) + 1
    hits = is_given[order].cumsum()[is_last]
    values = values[is_last]
    below = np.append(values[1:], 0.0)
    midway = (values + below) / 2
    thresholds = np.where(midway > below, midway, values)
    if precision is None:
        f1 = np.round(2 * hits / (rows + positives), 12)
        best = np.lexsort([np.abs(thresholds - 0.5), -f1])[0]
        return float(thresholds[best])
    is_precise = hits >= precision * rows - 1e-9  # 0.07 * 100 is more than 7
    if not is_precise.any():
        return None
    best = np.lexsort([rows, -np.where(is_precise, hits, -1)])[0]
    return float(thresholds[best])


def fit_temperature(distributions: Floats, classes: NDArray[np.int64]) -> float:
    """The temperature in [0.2, 10] with the smallest log loss. The loss is convex in 1/T."""
    from scipy.optimize import minimize_scalar

    def loss(inverse: float) -> float:
        return float(log_losses(_tempered_rows(distributions, 1 / inverse), classes).mean())

    fitted = minimize_scalar(loss, bounds=(1 / _HIGHEST, 1 / _LOWEST), method="bounded")
    return round(float(1 / fitted.x), 4)


def _tempered_rows(distributions: Floats, temperature: float) -> Floats:
    shares = (distributions / distributions.max(axis=1, keepdims=True)) ** (1 / temperature)
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def log_losses(distributions: Floats, classes: NDArray[np.int64]) -> Floats:
    """(rows, labels), and the right labels' indices (rows,) -> (rows,), in nats."""
    of_class = distributions[np.arange(len(classes)), classes]
    return np.asarray(-np.log(np.maximum(of_class, _SMALLEST)))


def brier_scores(distributions: Floats, classes: NDArray[np.int64]) -> Floats:
    """(rows, labels), and the right labels' indices (rows,) -> (rows,), in [0, 2]."""
    errors = distributions.copy()
    errors[np.arange(len(classes)), classes] -= 1
    return np.asarray((errors**2).sum(axis=1))


def _quality(
    distributions: Floats, classes: NDArray[np.int64], answers: NDArray[np.int64]
) -> CalibrationQuality:
    bins = binned(distributions[np.arange(len(answers)), answers], answers == classes)
    return CalibrationQuality(
        ece=calibration_error(bins),
        brier=float(brier_scores(distributions, classes).mean()),
        log_loss=float(log_losses(distributions, classes).mean()),
    )


def binned(probabilities: Floats, correct: NDArray[np.bool_]) -> list[Bin]:
    """Ten bins (low, high] of equal width, without the empty ones; both inputs (predictions,)."""
    edges = np.arange(1, NUM_BINS) / NUM_BINS
    bin_index = np.searchsorted(edges, probabilities, side="left")  # 0 is in the first bin as well
    bins = []
    for i in np.unique(bin_index).tolist():
        in_bin = bin_index == i
        bins.append(
            Bin(
                low=i / NUM_BINS,
                high=(i + 1) / NUM_BINS,
                n=int(in_bin.sum()),
                confidence=float(probabilities[in_bin].mean()),
                accuracy=float(correct[in_bin].mean()),
            )
        )
    return bins


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: the mean |accuracy - confidence| of a prediction's bin."""
    weighted = sum(b.n * abs(b.accuracy - b.confidence) for b in bins)
    return weighted / sum(b.n for b in bins)


# --- risk and coverage


def area_under_risk(confidence: Floats, losses: Floats) -> float:
    """The area under the risk-coverage curve (AURC; Geifman et al., 2019).

    The mean over k of the k surest rows' mean loss; rows of equal confidence are in any order, and
    the area is the mean over these orders.
    """
    counts, sums = tie_groups(confidence, losses)
    return float(areas(counts[None].astype(np.float64), sums[None])[0])


def tie_groups(confidence: Floats, losses: Floats) -> tuple[NDArray[np.int64], Floats]:
    """The rows and the summed losses of each distinct confidence, from the surest down."""
    _, group, counts = np.unique(-confidence, return_inverse=True, return_counts=True)
    sums = np.bincount(group, weights=losses, minlength=len(counts))
    return counts.astype(np.int64), sums.astype(np.float64)


def areas(counts: Floats, sums: Floats) -> Floats:
    """AURC of each resample. ``counts`` and ``sums`` (resamples, groups), as of `tie_groups`.

    The rows of a group lie between W and W + w; their k-th risk is (L + (k - W) m) / k, with the
    group's mean loss m, so that sums of 1/k suffice.
    """
    above = counts.cumsum(axis=1)
    losses_above = sums.cumsum(axis=1)
    below = above - counts
    losses_below = losses_above - sums
    total = above[:, -1].astype(np.int64)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, total.max() + 1))])
    reciprocals = harmonic[above.astype(np.int64)] - harmonic[below.astype(np.int64)]
    mean_loss = sums / np.maximum(counts, 1)
    per_group = sums + (losses_below - mean_loss * below) * reciprocals
    return np.asarray(per_group.sum(axis=1) / total)
