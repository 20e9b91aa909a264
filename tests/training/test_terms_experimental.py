"""The experimental terms against numpy and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from scipy.stats import entropy

from dsbs.training.distillation.experimental import (
    consistency,
    mutual_information,
    view_distributions,
)


def logits(seed: int, *shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


COUNTED = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])


def test_a_views_distribution_is_its_tokens_largest_probabilities_normalised_without_padding() -> (
    None
):
    tokens = logits(0, 3, 3, 5)
    found = view_distributions(tokens, COUNTED)
    assert found.shape == (3, 5)
    likely = softmax(tokens.numpy(), axis=-1)
    for row, length in ((0, 2), (1, 3)):
        largest = likely[row, :length].max(axis=0)
        np.testing.assert_allclose(found[row].numpy(), largest / largest.sum(), rtol=1e-10)
    assert not found[2].any()


def test_what_stands_at_padding_does_not_matter() -> None:
    tokens = logits(0, 3, 3, 5)
    other = tokens.clone()
    other[~COUNTED] = 100 * logits(1, int((~COUNTED).sum()), 5)
    assert torch.equal(view_distributions(tokens, COUNTED), view_distributions(other, COUNTED))


def test_the_marks_of_padding_may_lie_on_another_device_than_the_logits() -> None:
    assert view_distributions(logits(0, 3, 3, 5).to("meta"), COUNTED).device.type == "meta"


def test_mutual_information_is_the_cross_entropy_of_the_rationales_distribution_under_the_labels() -> (
    None
):
    label, rationale = logits(0, 4, 5).softmax(-1), logits(1, 4, 5).softmax(-1)
    expected = sum(
        entropy(p) + entropy(p, q) for p, q in zip(label.numpy(), rationale.numpy(), strict=True)
    )
    found = mutual_information(label, rationale)
    assert found.shape == () and float(found) == pytest.approx(float(expected))
    assert float(mutual_information(label, label)) == pytest.approx(
        sum(entropy(p) for p in label.numpy())
    )


def test_mutual_information_teaches_the_rationale_view_by_the_gradient_of_finite_differences() -> (
    None
):
    label, tokens = (
        logits(0, 3, 5).softmax(-1).requires_grad_(),
        logits(1, 3, 3, 5).requires_grad_(),
    )
    assert torch.autograd.gradcheck(
        lambda t: mutual_information(label, view_distributions(t, COUNTED)), tokens
    )
    mutual_information(label, view_distributions(tokens, COUNTED)).backward()
    assert label.grad is None and tokens.grad is not None and not tokens.grad[2].any()


def test_rows_without_one_of_the_views_count_nothing() -> None:
    label, rationale = logits(0, 3, 5).softmax(-1), logits(1, 3, 5).softmax(-1)
    label[1] = 0
    rationale[2] = 0
    assert float(mutual_information(label, rationale)) == pytest.approx(
        float(mutual_information(label[:1], rationale[:1]))
    )
    assert float(mutual_information(label[1:], rationale[1:])) == 0


def test_an_entry_that_the_rationale_never_says_costs_much_and_not_infinitely() -> None:
    label = torch.tensor([[0.5, 0.5, 0.0]]).double()
    rationale = torch.tensor([[1.0, 0.0, 0.0]]).double().requires_grad_()
    found = mutual_information(label, rationale)
    found.backward()
    assert (
        100 < float(found.detach()) < 1000
        and rationale.grad is not None
        and bool(rationale.grad.isfinite().all())
    )


def test_consistency_is_half_the_sum_of_both_divergences() -> None:
    first, second = logits(0, 4, 5), logits(1, 4, 5)
    p, q = (softmax(one.numpy(), axis=-1) for one in (first, second))
    expected = (rel_entr(p, q) + rel_entr(q, p)).sum() / 2
    found = consistency(first, second)
    assert found.shape == () and float(found) == pytest.approx(float(expected))
    assert float(consistency(second, first)) == pytest.approx(float(found))
    assert float(consistency(first, first + 3)) == pytest.approx(0, abs=1e-12)
    assert float(consistency(first[:0], second[:0])) == 0


def test_consistency_pulls_both_answers_by_the_gradient_of_finite_differences() -> None:
    first, second = logits(0, 4, 5).requires_grad_(), logits(1, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(consistency, (first, second))
    consistency(first, second).backward()
    assert first.grad is not None and second.grad is not None
    assert bool(first.grad.any()) and bool(second.grad.any())
