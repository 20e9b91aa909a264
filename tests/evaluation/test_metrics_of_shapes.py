"""Metrics of several labels, fields and scores: by hand, and against scikit-learn and scipy."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import (
    cohen_kappa_score,
    hamming_loss,
    mean_absolute_error,
    precision_recall_fscore_support,
)

from dsbs.config import TaskSection
from dsbs.evaluation.metrics import Measures, Scored, SystemPredictions, measure, score
from dsbs.evaluation.metrics_of_parts import part_results
from dsbs.records import Example, Prediction
from dsbs.tasks import Task, make_task

TAGS = make_task(TaskSection(name="multilabel", data={"train": "-"}, labels=["a", "b", "c"]))
SCALE = make_task(TaskSection(name="score", data={"train": "-"}, range=(1, 5)))
FIELDS = make_task(
    TaskSection(
        name="extraction",
        data={"train": "-"},
        fields={"name": {"type": "text", "verbatim": True}, "total": {"type": "number"}},
    )
)
Sets = st.lists(st.sets(st.sampled_from("abc")), min_size=2, max_size=12)


def scored(task: Task, gold: Sequence[str], raw: Sequence[str], text: str = "t") -> Scored:
    rows = [Example(id=str(i), input={"text": text}, label=label) for i, label in enumerate(gold)]
    predictions = {
        str(i): Prediction(id=str(i), raw=answer, made_by="test") for i, answer in enumerate(raw)
    }
    return score(task, rows, predictions, "system")


def predictions_of(
    task: Task, gold: Sequence[str], *raw: Sequence[str], clusters: Any = None
) -> SystemPredictions:
    return SystemPredictions(task, [scored(task, gold, answers) for answers in raw], clusters)


def values(measures: Measures) -> dict[str, float]:
    return {name: item.value for name, item in measures.metrics.items()}


def tags(labels: set[str]) -> str:
    return TAGS.gold(sorted(labels), {}, "x")


# --- several labels


@settings(max_examples=15, deadline=None)
@given(st.data(), Sets)
def test_metrics_of_several_labels_agree_with_scikit_learn(
    data: st.DataObject, gold: list[set[str]]
) -> None:
    guess = [data.draw(st.sets(st.sampled_from("abc"))) for _ in gold]
    predictions = predictions_of(TAGS, [*map(tags, gold)], [*map(tags, guess)])
    result = measure(predictions)
    truth, predicted = (np.array([[x in y for x in "abc"] for y in part]) for part in (gold, guess))
    ours = values(result)
    assert ours["hamming"] == pytest.approx(hamming_loss(truth, predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        micro = precision_recall_fscore_support(truth, predicted, average="micro")
        each = precision_recall_fscore_support(truth, predicted)
    expected = {"micro_precision": predicted, "micro_recall": truth, "micro_f1": truth | predicted}
    for (name, needed), theirs in zip(expected.items(), micro, strict=False):
        assert (name in ours) == bool(needed.any())
        if name in ours:
            assert ours[name] == pytest.approx(theirs)
            low, high = result.metrics[name].ci95 or (1, 0)
            assert 0 <= low <= ours[name] + 1e-12 and ours[name] - 1e-12 <= high <= 1
    occurs = (truth | predicted).any(axis=0)
    if occurs.any():
        assert ours["macro_f1"] == pytest.approx(each[2][occurs].mean())
    for i, (label, part) in enumerate(part_results(predictions).items()):
        assert label == "abc"[i] and part.gold == truth[:, i].sum()
        assert part.predicted == predicted[:, i].sum()
        assert part.accuracy.value == pytest.approx((truth[:, i] == predicted[:, i]).mean())
        for item, theirs, needed in zip(
            (part.precision, part.recall, part.f1),
            each[:3],
            (predicted, truth, truth | predicted),
            strict=True,
        ):
            assert (item is None) == (not needed[:, i].any())
            if item is not None:
                assert item.value == pytest.approx(theirs[i]) and item.n == needed[:, i].sum()


def test_an_unreadable_list_has_no_label_and_is_wrong_in_all() -> None:
    predictions = predictions_of(TAGS, ["a", "none", "a; b"], ["a", "?", "a; z"])
    ours = values(measure(predictions))
    assert ours["micro_precision"] == 1 and ours["micro_recall"] == pytest.approx(1 / 3)
    assert ours["hamming"] == pytest.approx(2 / 3)
    assert part_results(predictions)["c"].accuracy.value == pytest.approx(1 / 3)


def test_seeds_count_as_one_system_that_answers_with_any_of_them() -> None:
    predictions = predictions_of(TAGS, ["a", "b"], ["a", "b"], ["b", "b"])
    ours = values(measure(predictions))
    assert ours["micro_f1"] == pytest.approx(3 / 4)
    # a: found in half of a row, predicted in half of one, gold in one
    assert ours["macro_f1"] == pytest.approx((2 * 0.5 / 1.5 + 2 * 1 / 2.5) / 2)


def test_labels_without_an_exception_have_an_interval_that_allows_for_one() -> None:
    part = part_results(predictions_of(TAGS, ["a"] * 20 + ["none"] * 5, ["a"] * 20 + ["none"] * 5))
    assert part["a"].precision is not None and part["a"].precision.ci95 is not None
    assert part["a"].precision.ci95[0] == pytest.approx(0.025 ** (1 / 20))
    assert part["b"].precision is None and part["b"].recall is None


def test_clusters_are_drawn_whole() -> None:
    gold, raw = ["a", "b"] * 10, ["a", "a"] * 10
    alone = measure(predictions_of(TAGS, gold, raw)).metrics["micro_f1"]
    pairs = np.repeat(np.arange(10), 2)
    clustered = measure(predictions_of(TAGS, gold, raw, clusters=pairs)).metrics["micro_f1"]
    assert alone.value == clustered.value == 0.5
    assert alone.ci95 is not None and alone.ci95[1] - alone.ci95[0] > 0.2
    # all clusters are equal
    assert clustered.ci95 is not None and clustered.ci95[0] == pytest.approx(0.5 * 0.025**0.1)


# --- fields


def fields(name: str | None, total: float | None) -> str:
    return FIELDS.gold({"name": name, "total": total}, {}, "x")


def test_a_field_is_found_where_both_have_it_with_the_same_value() -> None:
    gold = [fields("Ann", 3), fields("Bob", None), fields(None, 1.5)]
    raw = ["name: ann\ntotal: 3.0", "name: Rob\ntotal: 2", fields(None, None)]
    predictions = predictions_of(FIELDS, gold, raw)
    ours = values(measure(predictions))
    assert ours["micro_precision"] == pytest.approx(2 / 4)
    assert ours["micro_recall"] == pytest.approx(2 / 4)
    assert ours["hamming"] == pytest.approx(3 / 6)
    assert "macro_f1" not in ours and predictions.files[0].correct.tolist() == [True, False, False]
    parts = part_results(predictions)
    assert [part.accuracy.value for part in parts.values()] == pytest.approx([2 / 3, 1 / 3])
    assert [part.gold for part in parts.values()] == [2, 2]
    assert [part.predicted for part in parts.values()] == [2, 2]


def test_values_that_the_input_lacks_are_counted() -> None:
    raw = ["name: Ann\ntotal: 1", "name: Bob\ntotal: 1", "?"]
    predictions = SystemPredictions(
        FIELDS, [scored(FIELDS, [fields("Ann", 1)] * 3, raw, text="From Ann, 1")]
    )
    item = measure(predictions).metrics["not_in_input"]
    assert item.value == 0.5 and item.n == 2


# --- scores


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=30))
def test_metrics_of_scores_agree_with_scikit_learn_and_scipy(pairs: list[tuple[int, int]]) -> None:
    gold, guess = map(list, zip(*pairs, strict=True))
    result = measure(predictions_of(SCALE, [*map(str, gold)], [*map(str, guess)]))
    ours = values(result)
    assert ours["mae"] == pytest.approx(mean_absolute_error(gold, guess))
    close = [abs(a - b) <= 1 for a, b in pairs]
    assert ours["within_one"] == pytest.approx(np.mean(close))
    assert ("spearman" in ours) == (len(set(gold)) > 1 and len(set(guess)) > 1)
    if "spearman" in ours:
        assert ours["spearman"] == pytest.approx(spearmanr(gold, guess).statistic, abs=1e-9)
    if len({*gold, *guess}) > 1:
        kappa = cohen_kappa_score(gold, guess, weights="quadratic", labels=[1, 2, 3, 4, 5])
        assert ours["quadratic_kappa"] == pytest.approx(kappa)
    else:
        assert "quadratic_kappa" not in ours
    for name in ("quadratic_kappa", "spearman"):
        if name in ours:
            low, high = result.metrics[name].ci95 or (1, 0)
            assert -1 - 1e-9 <= low <= high <= 1 + 1e-9


def test_an_unreadable_score_is_the_furthest_one() -> None:
    ours = values(measure(predictions_of(SCALE, ["1", "3", "5"], ["?", "?", "?"])))
    assert ours["mae"] == pytest.approx((4 + 2 + 4) / 3) and ours["within_one"] == 0
    assert ours["quadratic_kappa"] < 0


def test_a_scale_of_halves_measures_in_its_own_units() -> None:
    halves = make_task(TaskSection(name="score", data={"train": "-"}, range=(-0.5, 0.5), step=0.5))
    ours = values(measure(predictions_of(halves, ["-0.5", "0.5"], ["0", "0.5"])))
    assert ours["mae"] == 0.25 and ours["within_one"] == 1


def test_an_exception_to_exact_scores_may_be_as_far_off_as_the_scale_is_long() -> None:
    scale = make_task(TaskSection(name="score", data={"train": "-"}, range=(0, 100)))
    exact = [str(score) for score in range(20)]
    metrics = measure(predictions_of(scale, exact, exact)).metrics
    assert metrics["within_one"].ci95 is not None and metrics["mae"].ci95 is not None
    share = 1 - metrics["within_one"].ci95[0]
    assert metrics["mae"].ci95 == pytest.approx((0, 100 * share)) and share > 0.1


def test_a_long_scale_needs_little_memory() -> None:
    long = make_task(TaskSection(name="score", data={"train": "-"}, range=(0, 200)))
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 201, 60)
    guess = np.clip(gold + rng.integers(-9, 10, 60), 0, 200)
    result = measure(predictions_of(long, [*map(str, gold)], [*map(str, guess)]))
    kappa = cohen_kappa_score(gold, guess, weights="quadratic", labels=range(201))
    assert result.metrics["quadratic_kappa"].value == pytest.approx(kappa)
    assert result.metrics["spearman"].value == pytest.approx(spearmanr(gold, guess).statistic)


def test_labels_without_an_order_or_parts_have_none_of_these() -> None:
    task = make_task(TaskSection(name="classification", data={"train": "-"}, labels=["1", "2"]))
    names = set(measure(predictions_of(task, ["1", "2"], ["1", "1"])).metrics)
    assert names == {"exact_match_raw", "exact_match", "macro_f1"}
