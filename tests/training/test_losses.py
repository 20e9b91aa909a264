"""The objective against independent arithmetic in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dsbs.config import TrainSection
from dsbs.training.losses import (
    IGNORED,
    summed_binary_nll,
    summed_nll,
    view_weights,
    weighted_loss,
)
from dsbs.training.methods import method_of


def views(weight: float) -> dict[str, float]:
    return {"label": 1.0, "rationale": weight}


def test_summed_nll_leaves_padding_out_and_equals_the_definition() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    labels = torch.tensor([[1, 4, IGNORED], [0, IGNORED, IGNORED]])
    log_probs = logits - logits.exp().sum(-1, keepdim=True).log()
    expected = -(log_probs[0, 0, 1] + log_probs[0, 1, 4] + log_probs[1, 0, 0])
    assert float(summed_nll(logits, labels)) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 7.0]])
def test_the_binary_loss_is_the_mean_over_labels_and_leaves_padding_out(
    weights: list[float] | None,
) -> None:
    torch.manual_seed(0)
    logits = 5 * torch.randn(3, 3, dtype=torch.float64)
    targets = torch.tensor([[1, 0, 1], [IGNORED] * 3, [0, 0, 0]])
    expected = 0.0
    for row in (0, 2):
        for label in range(3):
            share = 1 / (1 + math.exp(-float(logits[row, label])))
            weight = 1.0 if weights is None else weights[label]
            is_given = targets[row, label] == 1
            expected -= (weight * math.log(share) if is_given else math.log(1 - share)) / 3
    tensor = None if weights is None else torch.tensor(weights)
    assert float(summed_binary_nll(logits, targets, tensor)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("weight", [0.25, 1.0, 4.0])
def test_the_loss_is_the_weighted_mean_of_the_two_token_means(weight: float) -> None:
    sums = {"label": torch.tensor(6.0), "rationale": torch.tensor(30.0)}
    loss = weighted_loss(sums, {"label": 3, "rationale": 10}, views(weight))
    assert float(loss) == pytest.approx((6 / 3 + weight * 30 / 10) / (1 + weight))


def test_weight_one_is_the_published_alpha_of_one_half() -> None:
    sums = {"label": torch.tensor(2.0), "rationale": torch.tensor(9.0)}
    assert float(weighted_loss(sums, {"label": 2, "rationale": 3}, views(1.0))) == pytest.approx(
        0.5 * 1 + 0.5 * 3
    )


def test_micro_batches_without_rationales_add_up_to_the_step_and_never_to_nan() -> None:
    counts = {"label": 5, "rationale": 4}
    first = weighted_loss(
        {"label": torch.tensor(3.0), "rationale": torch.tensor(8.0)}, counts, views(1.0)
    )
    second = weighted_loss({"label": torch.tensor(2.0)}, counts, views(1.0))
    whole = weighted_loss(
        {"label": torch.tensor(5.0), "rationale": torch.tensor(8.0)}, counts, views(1.0)
    )
    assert float(first + second) == pytest.approx(float(whole))
    assert math.isfinite(
        float(weighted_loss({"label": torch.tensor(2.0)}, {"label": 2, "rationale": 0}, views(1.0)))
    )


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [2.0, 2.0, 2.0]), ("linear", [2.0, 1.25, 0.5]), ("cosine", [2.0, 1.25, 0.5])],
)
def test_lambda_goes_where_its_schedule_says(schedule: str, expected: list[float]) -> None:
    train = TrainSection.model_validate(
        {
            "rationale_weight": 2.0,
            "rationale_weight_end": 0.5,
            "rationale_schedule": schedule,
            "max_steps": 100,
        }
    )
    of = method_of("step-by-step").views(train)
    assert [view_weights(of, train, step)["rationale"] for step in (0, 50, 100)] == pytest.approx(
        expected
    )
    assert {view_weights(of, train, step)["label"] for step in (0, 50, 100)} == {1.0}
    quarter = view_weights(of, train, 25)["rationale"]
    assert schedule != "cosine" or quarter == pytest.approx(
        2.0 - 1.5 * (1 - math.cos(math.pi / 4)) / 2
    )
