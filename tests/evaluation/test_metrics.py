"""Scores and metrics of labels: by hand, and against scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, recall_score

from dsbs import UserError
from dsbs.config import TaskSection
from dsbs.config.registry import METRICS
from dsbs.evaluation.bootstrap import Clusters
from dsbs.evaluation.calibration import calibration_bins
from dsbs.evaluation.metrics import (
    Measures,
    Scored,
    SystemPredictions,
    macro_f1,
    macro_f1_of_counts,
    measure,
    score,
)
from dsbs.records import Example, Prediction
from dsbs.students.calibration import binned, calibration_error
from dsbs.tasks import Task, make_task

NLI = make_task(TaskSection(name="esnli", data={"train": "-"}))
SVAMP = make_task(TaskSection(name="svamp", data={"train": "-"}))
CQA = make_task(TaskSection(name="cqa", data={"train": "-"}))
FREE = make_task(TaskSection(name="generation", data={"train": "-"}))


def scored(
    task: Task, gold: Sequence[str], raw: Sequence[str], probability: Sequence[float | None] = ()
) -> Scored:
    rows = [Example(id=str(i), input={"text": "t"}, label=label) for i, label in enumerate(gold)]
    predictions = {
        str(i): Prediction(
            id=str(i), raw=text, probability=probability[i] if probability else None, made_by="test"
        )
        for i, text in enumerate(raw)
    }
    return score(task, rows, predictions, "system")


def with_distributions(gold: list[str], shares: list[list[float]]) -> Scored:
    """Predictions with a distribution over the labels of NLI; the likeliest is the answer."""
    labels = NLI.labels or ()
    rows = [Example(id=str(i), input={"text": "t"}, label=label) for i, label in enumerate(gold)]
    predictions = {}
    for row, row_shares in zip(rows, shares, strict=True):
        distribution = dict(zip(labels, row_shares, strict=True))
        raw = max(distribution, key=distribution.__getitem__)
        predictions[row.id] = Prediction(
            id=row.id,
            raw=raw,
            probability=distribution[raw],
            distribution=distribution,
            made_by="test",
        )
    return score(NLI, rows, predictions, "system")


def measured(task: Task, files: Sequence[Scored], clusters: Clusters = None) -> Measures:
    return measure(SystemPredictions(task, files, clusters))


# --- the scorer


def test_labels_are_read_anew_in_the_raw_text_whatever_the_file_says_of_them() -> None:
    rows = [Example(id="a", input={}, label="neutral"), Example(id="b", input={}, label="neutral")]
    predictions = {
        "b": Prediction(
            id="b", raw="Neutral.", prediction=None, correct=False, made_by="old reader"
        ),
        "a": Prediction(
            id="a", raw="no label", prediction="neutral", correct=True, made_by="old reader"
        ),
        "other": Prediction(id="other", raw="neutral", made_by="x"),
    }
    result = score(NLI, rows, predictions, "system")
    assert result.labels == [None, "neutral"] and result.correct.tolist() == [False, True]
    assert [prediction.id for prediction in result.predictions] == ["a", "b"]


def test_the_same_text_is_read_by_its_own_rows_fields() -> None:
    rows = [
        Example(id="a", input={"question": "q", "choices": ["bank", "river"]}, label="bank"),
        Example(id="b", input={"question": "q", "choices": ["tree", "lake"]}, label="lake"),
    ]
    result = score(
        CQA, rows, {key: Prediction(id=key, raw="(b)", made_by="x") for key in "ab"}, "system"
    )
    assert result.labels == ["river", "lake"] and result.correct.tolist() == [False, True]


def test_an_equation_is_correct_by_its_value_within_a_tolerance() -> None:
    result = scored(SVAMP, ["( 84.0 / 2.0 )"] * 4, ["21 * 2", "42.00009", "42.0002", "about forty"])
    assert result.correct.tolist() == [True, True, False, False]


def test_rows_that_a_file_lacks_are_counted_and_the_first_is_named() -> None:
    rows = [Example(id=key, input={}, label="neutral") for key in "abc"]
    with pytest.raises(UserError, match=r"mine lack 2 of 3 rows \(first: 'b'\)"):
        score(NLI, rows, {"a": Prediction(id="a", raw="neutral", made_by="x")}, "mine")
    with pytest.raises(UserError, match="nothing to score"):
        score(NLI, [], {}, "mine")


# --- shares


def test_exact_match_of_the_raw_text_is_stricter_than_of_the_label() -> None:
    metrics = measured(
        NLI, [scored(NLI, ["neutral"] * 4, [" neutral ", "Neutral.", "contradiction", "?"])]
    ).metrics
    assert metrics["exact_match_raw"].value == 1 / 4 and metrics["exact_match"].value == 2 / 4
    assert "equation_value" not in metrics and "ece" not in metrics


def test_an_equation_has_four_ways_to_be_right_and_one_to_be_unreadable() -> None:
    gold = ["( 8.0 - 2.0 )"] * 5
    raw = ["( 8.0 - 2.0 )", "(8.0 - 2.0)", "8 - 2", "3 * 2", "six"]
    metrics = {
        name: measure_.value
        for name, measure_ in measured(SVAMP, [scored(SVAMP, gold, raw)]).metrics.items()
    }
    assert metrics == {
        "exact_match_raw": 1 / 5,
        "exact_match": 3 / 5,  # SVAMP's spelling of what was read
        "equation_string": 2 / 5,
        "equation_value": 4 / 5,
        "parse_failure": 1 / 5,
    }


def test_free_text_has_no_classes() -> None:
    measures = measured(FREE, [scored(FREE, ["a cat", "a dog"], ["a cat", "the dog"])])
    assert list(measures.metrics) == ["exact_match_raw", "exact_match"] and measures.recall == {}


def test_seeds_are_averaged_within_a_row_and_add_no_rows() -> None:
    gold = ["neutral", "entailment"] * 20
    first = scored(NLI, gold, ["neutral"] * 40)
    alone, thrice = measured(NLI, [first]), measured(NLI, [first, first, first])
    for name, once in (alone.metrics | alone.recall).items():
        again = (thrice.metrics | thrice.recall)[name]
        assert (again.value, again.n) == (pytest.approx(once.value), once.n)
        assert again.ci95 == pytest.approx(once.ci95)
    other = scored(NLI, gold, ["entailment"] * 40)
    both = measured(NLI, [first, other])
    assert both.metrics["exact_match"].value == 0.5 and both.metrics["exact_match"].n == 40
    assert both.recall["neutral"].value == 0.5 and both.recall["neutral"].n == 20


def test_every_metric_is_described_and_comes_in_the_described_order() -> None:
    probability = [0.5] * 4
    for task, label in ((NLI, "neutral"), (SVAMP, "( 1.0 + 1.0 )")):
        names = list(
            measured(task, [scored(task, [label] * 4, [label] * 3 + [""], probability)]).metrics
        )
        assert names == [name for name in METRICS if name in names] and names[-1] == "ece"


def test_rows_of_one_cluster_are_resampled_together() -> None:
    gold, raw = ["neutral"] * 60, (["neutral"] * 6 + ["entailment"] * 6) * 5
    apart = measured(NLI, [scored(NLI, gold, raw)])
    together = measured(NLI, [scored(NLI, gold, raw)], np.arange(60) // 6)
    for name in ("exact_match", "macro_f1"):
        narrow, wide = apart.metrics[name], together.metrics[name]
        assert narrow.value == wide.value and narrow.ci95 is not None and wide.ci95 is not None
        assert wide.ci95[1] - wide.ci95[0] > 1.5 * (narrow.ci95[1] - narrow.ci95[0])


# --- classes

outcomes = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30
)


@settings(deadline=None)
@given(outcomes)
def test_macro_f1_of_counts_is_scikit_learns_of_rows(rows: list[tuple[int, int, int]]) -> None:
    truth, *reads = (np.array(column) for column in zip(*rows, strict=True))
    expected = np.mean(
        [
            f1_score(truth, read, labels=sorted({*truth, *read} - {4}), average="macro")
            for read in reads
        ]
    )
    kinds, counts = np.unique(np.array(rows), axis=0, return_counts=True)
    statistic = macro_f1_of_counts(kinds[:, 0], kinds[:, 1:].T, 4)
    assert statistic(counts[None])[0] == pytest.approx(expected, abs=1e-12)
    assert macro_f1(truth, np.array(reads), 4).value == pytest.approx(expected, abs=1e-12)


def test_recall_is_scikit_learns_for_the_classes_that_occur() -> None:
    gold = ["neutral"] * 6 + ["entailment"] * 4
    raw = ["neutral"] * 3 + ["entailment"] * 2 + ["?"] + ["entailment"] * 3 + ["contradiction"]
    recalls = measured(NLI, [scored(NLI, gold, raw)]).recall
    classes = ["entailment", "neutral"]
    assert list(recalls) == classes
    assert [recalls[name].value for name in classes] == pytest.approx(
        recall_score(gold, raw, labels=classes, average=None)
    )
    assert [recalls[name].n for name in classes] == [4, 6]
    for measured_recall in recalls.values():
        assert (
            measured_recall.ci95 is not None
            and measured_recall.ci95[0] < measured_recall.value < measured_recall.ci95[1]
        )


def test_twenty_rows_without_a_mistake_do_not_prove_perfection() -> None:
    gold = ["neutral", "entailment"] * 10
    f1 = measured(NLI, [scored(NLI, gold, gold)]).metrics["macro_f1"]
    assert f1.value == 1.0 and f1.ci95 is not None and f1.ci95[0] < 0.95


# --- calibration


def test_calibration_error_by_hand() -> None:
    """Guo et al. (2017), equation 3, on five predictions in three bins."""
    bins = binned(
        np.array([0.95, 0.85, 0.9, 0.35, 0.35]), np.array([True, True, False, False, True])
    )
    assert [(bin_.low, bin_.high, bin_.n) for bin_ in bins] == [
        (0.3, 0.4, 2),
        (0.8, 0.9, 2),
        (0.9, 1.0, 1),
    ]
    assert [bin_.accuracy for bin_ in bins] == [0.5, 0.5, 1.0]
    assert calibration_error(bins) == pytest.approx((2 * 0.15 + 2 * 0.375 + 1 * 0.05) / 5)


@pytest.mark.parametrize(
    ("probability", "low"),
    [(0.0, 0.0), (0.1, 0.0), (0.3, 0.2), (0.7, 0.6), (0.70001, 0.7), (1.0, 0.9)],
)
def test_a_bin_holds_its_upper_edge_and_the_first_one_zero_as_well(
    probability: float, low: float
) -> None:
    (bin_,) = binned(np.array([probability]), np.array([True]))
    assert bin_.low == low


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_bins_hold_every_prediction_once_and_their_confidence_lies_in_them(
    pairs: list[tuple[float, bool]],
) -> None:
    bins = binned(np.array([p for p, _ in pairs]), np.array([right for _, right in pairs]))
    assert sum(bin_.n for bin_ in bins) == len(pairs)
    assert sum(bin_.n * bin_.accuracy for bin_ in bins) == pytest.approx(
        sum(right for _, right in pairs)
    )
    for bin_ in bins:
        assert bin_.low - 1e-12 <= bin_.confidence <= bin_.high + 1e-12
    assert all(left.high <= right.low for left, right in pairwise(bins))
    assert 0 <= calibration_error(bins) <= 1


def test_bins_are_of_all_seeds_and_one_unknown_probability_leaves_calibration_undefined() -> None:
    gold = ["neutral"] * 4
    first, other = (scored(NLI, gold, gold, [p] * 4) for p in (0.95, 0.75))
    measures = measured(NLI, [first, other])
    bins = calibration_bins(SystemPredictions(NLI, [first, other]))
    assert sum(bin_.n for bin_ in bins) == 8
    assert measures.metrics["ece"].value == pytest.approx(0.15) and measures.metrics["ece"].n == 4
    wrong = scored(NLI, gold, ["entailment"] * 4, [0.75] * 4)
    opposite = measured(NLI, [other, wrong]).metrics["ece"].value
    assert opposite == pytest.approx((0.25 + 0.75) / 2), "one seed's errors hide no other's"
    unknown = scored(NLI, gold, gold, [0.9, 0.9, 0.9, None])
    assert calibration_bins(SystemPredictions(NLI, [first, unknown])) == []


def test_log_loss_brier_and_auroc_by_hand_and_by_scikit_learn() -> None:
    from sklearn.metrics import log_loss, roc_auc_score

    gold = ["neutral", "entailment", "contradiction", "neutral"]
    shares = [[0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.9, 0.05, 0.05]]
    file = with_distributions(gold, shares)
    metrics = measured(NLI, [file]).metrics
    classes = sorted(NLI.labels or ())
    by_class = [
        [dict(zip(NLI.labels or (), row, strict=True))[c] for c in classes] for row in shares
    ]
    assert metrics["log_loss"].value == pytest.approx(log_loss(gold, by_class, labels=classes))
    by_hand = [0.14, 0.26, 0.62, 0.81 + 0.9025 + 0.0025]
    assert metrics["brier"].value == pytest.approx(np.mean(by_hand))
    confidences = [max(row) for row in shares]
    expected = roc_auc_score([True, True, False, False], confidences)
    assert metrics["confidence_auroc"].value == pytest.approx(expected)
    assert "log_loss" not in measured(NLI, [scored(NLI, gold, gold)]).metrics


def test_the_most_confused_pairs_are_counted_over_seeds() -> None:
    gold = ["entailment", "entailment", "neutral", "contradiction"]
    first = scored(NLI, gold, ["neutral", "neutral", "neutral", "what"])
    second = scored(NLI, gold, ["neutral", "entailment", "contradiction", "contradiction"])
    pairs = measured(NLI, [first, second]).confusions
    assert [(pair.gold, pair.predicted, pair.rows, pair.share) for pair in pairs] == [
        ("entailment", "neutral", 1.5, 0.75),
        ("neutral", "contradiction", 0.5, 0.5),
    ]
    assert measured(SVAMP, [scored(SVAMP, ["1"], ["2"])]).confusions == []
