"""The objective against independent arithmetic in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dsbs.train.losses import IGNORED, summed_nll, target_tokens, weighted_loss
from dsbs.train.methods import View


def views(weight: float) -> tuple[View, View]:
    return View("label", "predict: ", 1.0), View("rationale", "explain: ", weight)


def test_summed_nll_leaves_padding_out_and_equals_the_definition() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    labels = torch.tensor([[1, 4, IGNORED], [0, IGNORED, IGNORED]])
    log_probs = logits - logits.exp().sum(-1, keepdim=True).log()
    expected = -(log_probs[0, 0, 1] + log_probs[0, 1, 4] + log_probs[1, 0, 0])
    assert float(summed_nll(logits, labels)) == pytest.approx(float(expected), abs=1e-6)
    assert target_tokens(labels) == 3


@pytest.mark.parametrize("weight", [0.25, 1.0, 4.0])
def test_the_loss_is_the_weighted_mean_of_the_two_token_means(weight: float) -> None:
    sums = {"label": torch.tensor(6.0), "rationale": torch.tensor(30.0)}
    loss = weighted_loss(sums, {"label": 3, "rationale": 10}, views(weight))
    assert float(loss) == pytest.approx((6 / 3 + weight * 30 / 10) / (1 + weight))


def test_weight_one_is_the_published_alpha_of_one_half() -> None:
    sums = {"label": torch.tensor(2.0), "rationale": torch.tensor(9.0)}
    assert float(weighted_loss(sums, {"label": 2, "rationale": 3}, views(1.0))) == pytest.approx(0.5 * 1 + 0.5 * 3)


def test_micro_batches_without_rationales_add_up_to_the_step_and_never_to_nan() -> None:
    counts = {"label": 5, "rationale": 4}
    first = weighted_loss({"label": torch.tensor(3.0), "rationale": torch.tensor(8.0)}, counts, views(1.0))
    second = weighted_loss({"label": torch.tensor(2.0)}, counts, views(1.0))
    whole = weighted_loss({"label": torch.tensor(5.0), "rationale": torch.tensor(8.0)}, counts, views(1.0))
    assert float(first + second) == pytest.approx(float(whole))
    assert math.isfinite(float(weighted_loss({"label": torch.tensor(2.0)}, {"label": 2, "rationale": 0}, views(1.0))))
