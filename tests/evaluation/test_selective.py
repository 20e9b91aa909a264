"""Risk-coverage curves against their definition, and a temperature against scipy's optimum."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from dsbs.config import TaskSection
from dsbs.evaluation.selective import NAMES, risk_curve, risk_measures
from dsbs.students.calibration import (
    area_under_risk,
    calibrate,
    confidence_of,
    confidences,
    fit_temperature,
    rationale_agreement,
    tempered,
)
from dsbs.tasks import make_task

Floats = NDArray[np.float64]


def area_by_definition(losses: Floats) -> float:
    """The mean over k of the first k rows' mean loss."""
    return float((losses.cumsum() / np.arange(1, len(losses) + 1)).mean())


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
def test_the_area_is_the_mean_over_all_orders_of_equal_rows(pairs: list[tuple[int, bool]]) -> None:
    orders = [order for order in permutations(pairs) if _is_descending(order)]
    expected = np.mean([area_by_definition(np.array([loss for _, loss in o])) for o in orders])
    confidence = np.array([float(value) for value, _ in pairs])
    losses = np.array([float(loss) for _, loss in pairs])
    assert area_under_risk(confidence, losses) == pytest.approx(expected)


def _is_descending(order: tuple[tuple[int, bool], ...]) -> bool:
    values = [value for value, _ in order]
    return values == sorted(values, reverse=True)


def test_measures_by_hand() -> None:
    """Ten rows, wrong ones in places 3 and 10: the best order has them last."""
    losses = np.zeros(10)
    losses[[2, 9]] = 1
    confidence = np.linspace(0.95, 0.5, 10)
    measures = risk_measures([confidence], [losses])
    best = np.zeros(10)
    best[8:] = 1
    area = area_by_definition(losses)
    assert tuple(measures) == NAMES
    assert measures["aurc"].value == pytest.approx(area)
    assert measures["e_aurc"].value == pytest.approx(area - area_by_definition(best))
    assert measures["accuracy_at_50"].value == pytest.approx(0.8)
    assert measures["accuracy_at_90"].value == pytest.approx(8 / 9)
    for measure in measures.values():
        assert measure.ci95 is not None
        assert measure.ci95[0] <= measure.value <= measure.ci95[1]
    assert risk_curve([confidence], [losses])[-1] == (1.0, 0.2)


def test_an_order_without_information_has_the_error_rate_at_every_coverage() -> None:
    losses = (np.arange(40) % 4 == 0).astype(float)
    curve = risk_curve([np.full(40, 0.5)], [losses])
    assert {risk for _, risk in curve} == {0.25}
    assert risk_measures([np.full(40, 0.5)], [losses])["aurc"].value == pytest.approx(0.25)


def test_intervals_are_of_rows_drawn_for_all_seeds_and_clusters_alike() -> None:
    rng = np.random.default_rng(2)
    confidence = rng.random(300)
    losses = (rng.random(300) < 0.5 * (1 - confidence)).astype(float)
    single = risk_measures([confidence], [losses])
    repeated = risk_measures([confidence] * 3, [losses] * 3)
    assert repeated["aurc"].value == pytest.approx(single["aurc"].value)
    assert repeated["aurc"].ci95 == pytest.approx(single["aurc"].ci95)
    doubled = risk_measures(
        [np.repeat(confidence, 2)], [np.repeat(losses, 2)], np.repeat(np.arange(300), 2)
    )
    assert doubled["aurc"].value == pytest.approx(single["aurc"].value, abs=2e-3)
    low, high = single["aurc"].ci95 or (0, 0)
    assert doubled["aurc"].ci95 == pytest.approx((low, high), abs=4e-3)


def test_no_error_does_not_mean_no_uncertainty() -> None:
    measures = risk_measures([np.linspace(0, 1, 50)], [np.zeros(50)])
    assert measures["accuracy_at_50"].ci95 == pytest.approx((0.025 ** (1 / 25), 1.0))
    assert measures["aurc"].ci95 == pytest.approx((0.0, 1 - 0.025 ** (1 / 50)))


# --- temperature


def test_the_temperature_of_overconfident_logits_is_recovered() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(4000, 4)) * 2
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    classes = np.array([rng.choice(4, p=row) for row in shares])
    too_sure = np.exp(3 * logits) / np.exp(3 * logits).sum(axis=1, keepdims=True)
    assert fit_temperature(too_sure, classes) == pytest.approx(3, rel=0.05)
    calibration = calibrate(too_sure.tolist(), classes.tolist(), "gold")
    assert calibration.after.log_loss < calibration.before.log_loss
    assert calibration.after.ece < 0.03 < calibration.before.ece
    assert calibration.after.brier < calibration.before.brier
    assert min(calibration.aurc.values()) == pytest.approx(calibration.aurc[calibration.confidence])


def test_a_student_without_errors_does_not_become_certain() -> None:
    calibration = calibrate([(0.7, 0.3)] * 20, [0] * 20, "gold")
    assert calibration.temperature == pytest.approx(0.2, abs=0.01)


@settings(max_examples=60)
@given(
    arrays(np.float64, 5, elements=st.floats(1e-6, 1)), st.floats(0.2, 10), st.sampled_from([0, 1])
)
def test_a_temperature_keeps_the_order_and_the_sum(
    raw: Floats, temperature: float, zeros: int
) -> None:
    shares = (raw / raw.sum()).tolist() + [0.0] * zeros
    changed = tempered(shares, temperature)
    assert sum(changed) == pytest.approx(1)
    assert (
        changed.index(max(changed)) == shares.index(max(shares))
        or max(changed) == changed[shares.index(max(shares))]
    )
    logits = np.log(np.maximum(shares, 1e-300)) / temperature
    expected = np.exp(logits - logits.max())
    assert changed == pytest.approx((expected / expected.sum()).tolist(), abs=1e-6)


def test_confidence_by_hand() -> None:
    rows = np.array([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    assert confidences("probability", rows) == pytest.approx([0.5, 1, 1 / 3])
    assert confidences("margin", rows) == pytest.approx([0.2, 1, 0])
    entropy = -sum(p * np.log(p) for p in rows[0]) / np.log(3)
    assert confidences("entropy", rows) == pytest.approx([1 - entropy, 1, 0], abs=1e-9)
    assert confidence_of("margin", 0.5, {"a": 0.5, "b": 0.3}) == pytest.approx(0.2)
    assert confidence_of("margin", 0.7, None) == 0.7
    assert confidence_of("probability", None, None) is None
    assert confidence_of("views", 0.9, None) is None, "without a rationale it is unknown"


def test_views_count_before_the_probability() -> None:
    task = make_task(TaskSection(name="esnli", data={"train": "-"}))
    stated = {
        1.0: "A dog is an animal. So the answer is neutral.",
        0.5: "A dog is an animal.",
        0.0: "A dog is an animal. So the answer is entailment.",
    }
    orders = []
    for agreement, rationale in stated.items():
        assert rationale_agreement("neutral", rationale, task, {}) == agreement
        orders += [confidence_of("views", share, None, agreement) for share in (0.99, 0.4)]
    assert orders == sorted(orders, key=lambda value: -(value or 0))

    # Rationales that state another label exactly where the label is wrong.
    distributions = [(0.9, 0.1)] * 10 + [(0.6, 0.4)] * 10
    wrong = [i % 4 == 0 for i in range(20)]
    agreements = [0.0 if is_wrong else 1.0 for is_wrong in wrong]
    calibration = calibrate(
        distributions, [int(is_wrong) for is_wrong in wrong], "gold", agreements
    )
    assert calibration.confidence == "views"
    assert calibrate(distributions, [int(w) for w in wrong], "gold").confidence == "probability"
