"""Several labels and scales at prediction: thresholds, temperatures, medians."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from several_labels import TAGS, TASKS

from dsbs.config import TaskSection
from dsbs.students.backends import GeneratedText
from dsbs.students.calibration import best_threshold, calibrate, calibrate_each, tempered_each
from dsbs.students.card import StudentCard
from dsbs.students.student import Student
from dsbs.tasks import Task, make_task

Share = st.floats(0, 1)
Rows = st.lists(st.tuples(Share, st.booleans()), min_size=1, max_size=30)


def task(kind: str) -> Task:
    return make_task(TaskSection.model_validate(TASKS[kind] | {"data": {"train": "rows.csv"}}))


def f1(is_chosen: np.ndarray[Any, Any], is_given: np.ndarray[Any, Any]) -> float:
    return float(2 * (is_chosen & is_given).sum() / max(1, is_chosen.sum() + is_given.sum()))


def rows_of(rows: list[tuple[float, bool]]) -> tuple[Any, Any]:
    return np.array([share for share, _ in rows]), np.array([label for _, label in rows])


@given(Rows)
def test_no_threshold_has_a_higher_f1(rows: list[tuple[float, bool]]) -> None:
    shares, is_given = rows_of(rows)
    threshold = best_threshold(shares, is_given, None)
    assert threshold is not None and 0 <= threshold <= 1
    if not is_given.any():
        assert threshold == 0.5
        return
    best = max(f1(shares >= limit, is_given) for limit in shares)
    assert f1(shares >= threshold, is_given) == pytest.approx(best)


@given(Rows, st.floats(0.05, 1))
def test_a_precision_is_reached_with_the_most_right_rows_or_never(
    rows: list[tuple[float, bool]], precision: float
) -> None:
    shares, is_given = rows_of(rows)
    threshold = best_threshold(shares, is_given, precision)
    hits = {
        limit: int((is_given & (shares >= limit)).sum())
        for limit in shares
        if (is_given & (shares >= limit)).sum() >= precision * (shares >= limit).sum() - 1e-9
    }
    if threshold is None:
        assert max(hits.values(), default=0) == 0
        return
    is_chosen = shares >= threshold
    assert (is_given & is_chosen).sum() >= precision * is_chosen.sum() - 1e-9
    assert (is_given & is_chosen).sum() == max(hits.values())


def test_a_precision_that_is_reached_exactly_counts() -> None:
    is_given = np.arange(100) < 7
    shares = np.full(100, 0.6)
    assert best_threshold(shares, is_given, 0.07) is not None


def test_each_probability_is_tempered_on_its_own() -> None:
    logits = [-3.0, 0.0, 0.5, 8.0]
    shares = [1 / (1 + math.exp(-z)) for z in logits]
    expected = [1 / (1 + math.exp(-z / 2.5)) for z in logits]
    assert tempered_each(shares, 2.5) == pytest.approx(expected, rel=1e-9)
    assert tempered_each(shares, 1) == pytest.approx(shares)
    assert tempered_each([0.0, 1.0], 3) == (0.0, 1.0)


def test_one_temperature_has_the_smallest_summed_binary_loss() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 1.5, (400, 3))
    is_given = generator.random((400, 3)) < 1 / (1 + np.exp(-logits))
    too_sure = 1 / (1 + np.exp(-3 * logits))
    found = calibrate_each(too_sure, is_given, "gold", TAGS)

    def loss(temperature: float) -> float:
        z = 3 * logits / temperature
        return float(np.where(is_given, np.logaddexp(0, -z), np.logaddexp(0, z)).mean())

    grid = np.arange(1.0, 6.0, 0.01)
    assert found.temperature == pytest.approx(min(grid, key=loss), abs=0.02)
    assert found.after.log_loss == pytest.approx(loss(found.temperature), rel=1e-3)
    assert found.before.log_loss == pytest.approx(loss(1.0), rel=1e-3)
    assert found.confidence == "probability" and set(found.aurc) == {"probability"}
    assert found.label_thresholds is not None
    assert list(found.label_thresholds.values) == list(TAGS)


def test_a_row_is_as_sure_as_its_least_sure_label() -> None:
    tags = task("multilabel")
    shares = {"billing": 0.9, "refund": 0.4, "shipping": 0.05}
    names = tuple(shares)
    assert tags.choose(names, tuple(shares.values())) == "billing"
    assert tags.probability_of("billing", shares) == pytest.approx(0.6)
    thresholds = {"billing": None, "refund": 0.4, "shipping": 0.01}
    chosen = tags.choose(names, tuple(shares.values()), thresholds)
    assert chosen == "refund; shipping" and tags.value(chosen) == ["refund", "shipping"]
    assert tags.probability_of(chosen, shares) == pytest.approx(0.05)
    assert tags.choose(names, (0.1, 0.2, 0.3)) == "none"
    assert tags.head_targets("refund; shipping") == (0, 1, 1)
    assert tags.head_targets("none") == (0, 0, 0)


@given(st.lists(st.floats(0.001, 1), min_size=5, max_size=5))
def test_no_point_has_a_smaller_expected_absolute_error_than_the_median(
    weights: list[float],
) -> None:
    scale = task("score")
    points = scale.labels or ()
    shares = [weight / math.fsum(weights) for weight in weights]

    def error(point: str) -> float:
        pairs = zip(points, shares, strict=True)
        return math.fsum(share * abs(float(other) - float(point)) for other, share in pairs)

    answer = scale.choose(points, shares)
    assert answer in points and error(answer) <= min(map(error, points)) + 1e-9
    distribution = dict(zip(points, shares, strict=True))
    assert scale.probability_of(answer, distribution) == distribution[answer]
    mean = math.fsum(float(point) * share for point, share in distribution.items())
    assert scale.expected_number(distribution) == pytest.approx(mean)
    assert scale.answer("no point", {}, distribution) == answer
    assert task("multilabel").expected_number({"billing": 0.5}) is None


def test_calibration_judges_the_answer_that_is_given() -> None:
    scale = task("score")
    points = scale.labels or ()
    # the likeliest point is 1 or 5, the median 3
    rows = [[0.3, 0.1, 0.2, 0.1, 0.3], [0.35, 0.1, 0.25, 0.1, 0.2]]
    found = calibrate(
        rows, [2, 2], "gold", choose=lambda shares: points.index(scale.choose(points, shares))
    )
    assert found.aurc["probability"] == 0.0, "both are right"
    assert calibrate(rows, [2, 2], "gold").aurc["probability"] == 1.0


class Pieces:
    """A tokenizer that decodes ids to the pieces of a text; the last id is an end token."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(self.pieces[index] for index in token_ids if index < len(self.pieces))


@pytest.mark.parametrize(
    ("pieces", "values"),
    [
        # as byte-level decoders write: the line break, and the end token, end a value
        (("kind", ":", " bill", "\n", "num", "ber:", " ", "1", "2"), [(2, 3), (6, 7, 8, 9)]),
        # as T5 writes: without line breaks, and a blank at the start
        ((" kind", ":", " box", " number", ":", " 12"), [(2, 3), (5, 6)]),
        ((" kind: b", "ox nu", "mber: null"), [(0, 1), (2, 3)]),
        (("kind", ":", " bill", "\n", "number", ":"), [(2, 3), (6,)]),
    ],
)
def test_a_fields_probability_is_that_of_its_values_tokens_and_of_the_one_that_ends_it(
    pieces: tuple[str, ...], values: list[tuple[int, ...]]
) -> None:
    shares = [0.9 - 0.05 * index for index in range(len(pieces) + 1)]
    tokens = tuple((index, math.log(share)) for index, share in enumerate(shares))
    backend: Any = SimpleNamespace(tokenizer=Pieces(*pieces))
    section = TaskSection.model_validate(TASKS["extraction"] | {"data": {"train": "rows.csv"}})
    card = StudentCard(
        name="tiny",
        method="finetune",
        labels="gold",
        seed=0,
        task=section,
        prefixes={"label": ""},
        max_input_tokens=24,
        max_target_tokens=12,
        kind="causal",
    )
    student = Student(backend, card)
    output = GeneratedText("".join(pieces).strip(), False, math.prod(shares), tokens=tokens)
    expected = [math.prod(shares[index] for index in indices) for indices in values]
    probabilities = student.field_probabilities(output)
    assert probabilities == pytest.approx(dict(zip(("kind", "number"), expected, strict=True)))
    tempered = student.field_probabilities(output, 2.0) or {}
    assert list(tempered.values()) == pytest.approx(tempered_each(expected, 2.0))
    assert student.field_probabilities(output._replace(tokens=())) is None
