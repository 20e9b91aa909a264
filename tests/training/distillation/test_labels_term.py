"""Label term against scipy, and the distributions that annotations give over a task's labels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from dsbs.config import TaskSection
from dsbs.records import Annotation, Sample, TeacherName
from dsbs.tasks import make_task
from dsbs.training.distillation.labels import label_distribution_loss
from dsbs.training.rows import vote_distribution

LABELS = ("entailment", "neutral", "contradiction")
ESNLI = make_task(TaskSection.model_validate({"name": "esnli", "data": {"train": "-"}}))


def scores_and_target(rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of texts, which sum to less than 1, and target distributions."""
    torch.manual_seed(0)
    return 3 * torch.randn(rows, 3).double() - 2, torch.randn(rows, 3).double().softmax(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_loss_is_kl_over_the_labels_with_both_sides_softened(temperature: float) -> None:
    scores, target = scores_and_target()
    softened = target.numpy() ** (1 / temperature)
    softened /= softened.sum(axis=-1, keepdims=True)
    student = softmax(scores.numpy() / temperature, axis=-1)
    expected = temperature**2 * rel_entr(softened, student).sum()
    loss = label_distribution_loss(scores, target, temperature=temperature)
    assert float(loss) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_gradient_equals_finite_differences(temperature: float) -> None:
    scores, target = scores_and_target()
    target[0] = torch.tensor([1.0, 0.0, 0.0])
    target[1] = 0
    scores.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: label_distribution_loss(s, target, temperature=temperature), scores
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_certain_target_gives_the_cross_entropy_over_the_labels(temperature: float) -> None:
    scores, _ = scores_and_target()
    labels = [0, 2, 1, 1]
    logprobs = log_softmax(scores.numpy() / temperature, axis=-1)
    expected = -(temperature**2) * logprobs[range(4), labels].sum()
    target = torch.eye(3).double()[labels]
    loss = label_distribution_loss(scores, target, temperature=temperature)
    assert float(loss) == pytest.approx(float(expected))


def test_the_scores_need_not_be_normalized() -> None:
    """The probability of texts that are no label is left out."""
    scores, target = scores_and_target()
    shifted = scores - torch.tensor([[0.0], [1.0], [7.0], [30.0]])
    expected = float(label_distribution_loss(scores, target, temperature=2.0))
    loss = label_distribution_loss(shifted, target, temperature=2.0)
    assert float(loss) == pytest.approx(expected)


def test_rows_without_a_target_add_nothing() -> None:
    scores, target = scores_and_target()
    target[1] = 0
    rows = [0, 2, 3]
    expected = float(label_distribution_loss(scores[rows], target[rows], temperature=1.0))
    loss = label_distribution_loss(scores, target, temperature=1.0)
    assert float(loss) == pytest.approx(expected)


def test_a_batch_without_targets_has_loss_zero_with_a_gradient() -> None:
    scores, target = scores_and_target()
    scores.requires_grad_()
    loss = label_distribution_loss(scores, torch.zeros_like(target), temperature=1.0)
    loss.backward()
    assert float(loss.detach()) == 0
    assert scores.grad is not None
    assert not scores.grad.any()


def test_a_temperature_near_one_is_the_loss_without_temperature() -> None:
    scores, target = scores_and_target()
    loss = float(label_distribution_loss(scores, target, temperature=1 + 1e-7))
    expected = float(label_distribution_loss(scores, target, temperature=1.0))
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_high_temperature_has_the_gradient_of_matching_centered_logarithms() -> None:
    scores, target = scores_and_target()
    logarithms = target.log()
    centered_scores = scores - scores.mean(-1, keepdim=True)
    centered = centered_scores - (logarithms - logarithms.mean(-1, keepdim=True))
    scores.requires_grad_()
    label_distribution_loss(scores, target, temperature=1e4).backward()
    assert scores.grad is not None
    np.testing.assert_allclose(scores.grad.numpy(), centered.detach().numpy() / 3, atol=1e-3)


# --- distributions of annotations


def distribution(
    *samples: dict[str, Any], labels: tuple[str, ...] = LABELS, task: Any = ESNLI
) -> list[float] | None:
    annotation = Annotation(
        id="1",
        input={"premise": "a", "hypothesis": "b"},
        teacher=TeacherName(kind="openai", model="m"),
        samples=[Sample(text="", **sample) for sample in samples],
    )
    return vote_distribution(annotation, labels, task)


def test_several_samples_give_each_label_its_share_of_the_readable_ones() -> None:
    samples = [
        {"label": "neutral"},
        {"label": "neutral"},
        {"label": "entailment"},
        {"reason": "unparsed"},
    ]
    assert distribution(*samples) == pytest.approx([1 / 3, 2 / 3, 0.0])


def test_a_sample_with_a_flawed_rationale_still_votes() -> None:
    samples = [{"label": "neutral"}, {"label": "entailment", "reason": "too-short"}]
    assert distribution(*samples) == pytest.approx([0.5, 0.5, 0.0])


def test_a_hinted_sample_does_not_vote() -> None:
    hinted = {"label": "entailment", "hinted": True}
    assert distribution({"label": "neutral"}, hinted) == [0.0, 1.0, 0.0]
    assert distribution(hinted) is None


def test_a_single_sample_spreads_the_rest_of_its_probability_evenly() -> None:
    shares = distribution({"label": "neutral", "label_logprob": math.log(0.8)})
    assert shares == pytest.approx([0.1, 0.8, 0.1])
    assert sum(shares or []) == pytest.approx(1)


def test_a_log_probability_rounded_above_zero_is_certainty() -> None:
    assert distribution({"label": "neutral", "label_logprob": 1e-9}) == [0.0, 1.0, 0.0]


def test_votes_of_several_samples_count_equally_whatever_their_probabilities() -> None:
    samples = [
        {"label": "neutral", "label_logprob": -2.0},
        {"label": "neutral", "label_logprob": -0.1},
    ]
    assert distribution(*samples) == [0.0, 1.0, 0.0]


def test_no_readable_sample_gives_no_distribution() -> None:
    assert distribution() is None
    assert distribution({"reason": "no-reply"}, {"reason": "unparsed"}) is None
    assert distribution({"label": "maybe"}) is None


def test_the_only_label_has_all_probability() -> None:
    sample = {"label": "neutral", "label_logprob": -3.0}
    assert distribution(sample, labels=("neutral",)) == [1.0]


def test_the_task_decides_which_labels_are_the_same() -> None:
    task = make_task(TaskSection.model_validate({"name": "svamp", "data": {"train": "-"}}))
    samples = [{"label": "(84 / 2)"}, {"label": "(6 + 36)"}, {"label": "7"}]
    assert distribution(*samples, labels=("42", "7"), task=task) == pytest.approx([2 / 3, 1 / 3])
