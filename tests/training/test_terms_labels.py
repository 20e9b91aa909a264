"""Soft label targets against scipy, and what a teacher's samples say of a task's labels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from dsbs.config import TaskSection
from dsbs.records.rows import Annotation, Sample, TeacherName
from dsbs.tasks import make_task
from dsbs.training.distillation.labels import label_distribution, vote_distribution

LABELS = ("entailment", "neutral", "contradiction")
ESNLI = make_task(TaskSection.model_validate({"name": "esnli", "data": {"train": "-"}}))


def scored(rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, which are log-probabilities of texts and so add up to less than 1, and targets."""
    torch.manual_seed(0)
    return 3 * torch.randn(rows, 3).double() - 2, torch.randn(rows, 3).double().softmax(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_label_term_is_kl_over_the_labels_with_both_sides_softened(temperature: float) -> None:
    scores, target = scored()
    softened = target.numpy() ** (1 / temperature)
    softened /= softened.sum(axis=-1, keepdims=True)
    expected = (
        temperature**2 * rel_entr(softened, softmax(scores.numpy() / temperature, axis=-1)).sum()
    )
    assert float(label_distribution(scores, target, temperature=temperature)) == pytest.approx(
        float(expected), rel=1e-10
    )


def test_the_label_terms_gradient_is_that_of_finite_differences() -> None:
    scores, target = scored()
    target[0] = torch.tensor([1.0, 0.0, 0.0])
    target[1] = 0
    scores.requires_grad_()
    for temperature in (1.0, 2.5):
        assert torch.autograd.gradcheck(
            lambda s, t=temperature: label_distribution(s, target, temperature=t), scores
        )


def test_a_certain_target_is_the_cross_entropy_over_the_label_set_at_any_temperature_of_the_target() -> (
    None
):
    scores, _ = scored()
    certain = torch.eye(3).double()[[0, 2, 1, 1]]
    expected = -log_softmax(scores.numpy(), axis=-1)[range(4), [0, 2, 1, 1]].sum()
    assert float(label_distribution(scores, certain, temperature=1.0)) == pytest.approx(
        float(expected)
    )
    soft = -4 * log_softmax(scores.numpy() / 2, axis=-1)[range(4), [0, 2, 1, 1]].sum()
    assert float(label_distribution(scores, certain, temperature=2.0)) == pytest.approx(float(soft))


def test_what_all_labels_have_in_common_changes_nothing() -> None:
    """The scores need not be normalised over the labels: what no label has of the probability is left out."""
    scores, target = scored()
    less = scores - torch.tensor([[0.0], [1.0], [7.0], [30.0]])
    assert float(label_distribution(less, target, temperature=2.0)) == pytest.approx(
        float(label_distribution(scores, target, temperature=2.0))
    )


def test_rows_without_a_target_count_nothing_and_a_batch_of_them_is_zero_with_a_gradient() -> None:
    scores, target = scored()
    target[1] = 0
    known = [0, 2, 3]
    assert float(label_distribution(scores, target, temperature=1.0)) == pytest.approx(
        float(label_distribution(scores[known], target[known], temperature=1.0))
    )
    scores.requires_grad_()
    nothing = label_distribution(scores, torch.zeros_like(target), temperature=1.0)
    nothing.backward()
    assert float(nothing.detach()) == 0 and scores.grad is not None and not scores.grad.any()


def test_temperature_near_one_is_the_term_without() -> None:
    scores, target = scored()
    near = float(label_distribution(scores, target, temperature=1 + 1e-7))
    assert near == pytest.approx(
        float(label_distribution(scores, target, temperature=1.0)), rel=1e-5
    )


def test_at_a_high_temperature_the_gradient_is_that_of_matching_centred_logarithms() -> None:
    scores, target = scored()
    centred = (scores - scores.mean(-1, keepdim=True)) - (
        target.log() - target.log().mean(-1, keepdim=True)
    )
    scores.requires_grad_()
    label_distribution(scores, target, temperature=1e4).backward()
    assert scores.grad is not None
    np.testing.assert_allclose(scores.grad.numpy(), centred.detach().numpy() / 3, atol=1e-3)


# --- what a teacher said


def annotation(*samples: dict[str, Any]) -> Annotation:
    return Annotation(
        id="1",
        input={"premise": "a", "hypothesis": "b"},
        teacher=TeacherName(kind="openai", model="m"),
        samples=[Sample(text="", **sample) for sample in samples],
    )


def said(*samples: dict[str, Any], labels: tuple[str, ...] = LABELS) -> list[float] | None:
    return vote_distribution(annotation(*samples), labels, ESNLI)


def test_several_samples_are_shares_of_the_readable_ones() -> None:
    votes = [
        {"label": "neutral"},
        {"label": "neutral"},
        {"label": "entailment"},
        {"reason": "unparsed"},
    ]
    assert said(*votes) == pytest.approx([1 / 3, 2 / 3, 0.0])


def test_a_flawed_rationale_makes_a_vote_no_less_a_vote() -> None:
    assert said(
        {"label": "neutral"}, {"label": "entailment", "reason": "too-short"}
    ) == pytest.approx([0.5, 0.5, 0.0])


def test_an_answer_given_away_in_the_request_is_no_vote() -> None:
    assert said({"label": "neutral"}, {"label": "entailment", "hinted": True}) == [0.0, 1.0, 0.0]
    assert said({"label": "entailment", "hinted": True}) is None


def test_a_single_samples_probability_goes_to_its_label_and_the_rest_evenly_to_the_others() -> None:
    found = said({"label": "neutral", "label_logprob": math.log(0.8)})
    assert found == pytest.approx([0.1, 0.8, 0.1]) and sum(found or []) == pytest.approx(1)


def test_a_logprob_rounded_above_zero_is_certainty() -> None:
    assert said({"label": "neutral", "label_logprob": 1e-9}) == [0.0, 1.0, 0.0]


def test_of_several_samples_the_votes_count_and_not_their_probabilities() -> None:
    pair = [
        {"label": "neutral", "label_logprob": -2.0},
        {"label": "neutral", "label_logprob": -0.1},
    ]
    assert said(*pair) == [0.0, 1.0, 0.0]


def test_nothing_readable_is_nothing_known() -> None:
    assert said() is None
    assert said({"reason": "no-reply"}, {"reason": "unparsed"}) is None
    assert said({"label": "maybe"}) is None


def test_one_label_alone_has_all() -> None:
    assert said({"label": "neutral", "label_logprob": -3.0}, labels=("neutral",)) == [1.0]


def test_labels_are_the_same_where_the_task_says_so() -> None:
    task = make_task(TaskSection.model_validate({"name": "svamp", "data": {"train": "-"}}))
    votes = annotation({"label": "(84 / 2)"}, {"label": "(6 + 36)"}, {"label": "7"})
    found = vote_distribution(votes, ["42", "7"], task)
    assert found == pytest.approx([2 / 3, 1 / 3])
