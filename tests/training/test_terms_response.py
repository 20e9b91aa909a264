"""Response terms against scipy, finite differences, and the limits that their papers state."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr, softmax
from torch import Tensor

from dsbs.training.distillation.response import Divergence, ensemble, response, response_top_k

KINDS: tuple[Divergence, ...] = ("kl", "reverse", "js")
ROWS, VOCABULARY = 4, 9


def pair(seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits (M, V) in float64."""
    torch.manual_seed(seed)
    return scale * torch.randn(ROWS, VOCABULARY).double(), scale * torch.randn(
        ROWS, VOCABULARY
    ).double()


def term(
    student: Tensor,
    teacher: Tensor,
    kind: Divergence = "kl",
    *,
    temperature: float = 1.0,
    share: float = 0.5,
) -> Tensor:
    """By the teacher's logits."""
    logprobs = (teacher / temperature).log_softmax(dim=-1)
    return response(student, logprobs, temperature=temperature, divergence=kind, share=share)


def plain(
    student: Tensor, teacher: Tensor, kind: Divergence, temperature: float, share: float
) -> float:
    """The definitions, written over numpy's probabilities."""
    q, p = (softmax(logits.numpy() / temperature, axis=-1) for logits in (student, teacher))
    mixture = share * p + (1 - share) * q
    value: Any = {
        "kl": rel_entr(p, q),
        "reverse": rel_entr(q, p),
        "js": share * rel_entr(p, mixture) + (1 - share) * rel_entr(q, mixture),
    }[kind]
    return float(temperature**2 * value.sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_response_term_is_its_divergence_times_the_squared_temperature(
    kind: Divergence, temperature: float
) -> None:
    student, teacher = pair()
    found = term(student, teacher, kind, temperature=temperature, share=0.3)
    assert found.shape == () and found.dtype == torch.float64
    assert float(found) == pytest.approx(plain(student, teacher, kind, temperature, 0.3), rel=1e-10)


def test_js_with_equal_shares_is_the_squared_jensen_shannon_distance() -> None:
    student, teacher = pair()
    expected = (
        jensenshannon(softmax(student.numpy(), axis=-1), softmax(teacher.numpy(), axis=-1), axis=-1)
        ** 2
    ).sum()
    assert float(term(student, teacher, "js")) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_response_term_is_that_of_finite_differences(kind: Divergence) -> None:
    student, teacher = pair()
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: term(s, teacher, kind, temperature=2.0, share=0.3), student
    )
    logprobs, ids = (teacher / 2).log_softmax(-1).topk(3)
    assert torch.autograd.gradcheck(
        lambda s: response_top_k(s, ids, logprobs, temperature=2.0, divergence=kind, share=0.3),
        student,
    )


def test_the_teacher_takes_no_gradient() -> None:
    student, teacher = pair()
    student.requires_grad_()
    teacher.requires_grad_()
    for kind in KINDS:
        term(student, teacher, kind).backward()
    assert teacher.grad is None and student.grad is not None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.25, 8), st.sampled_from(KINDS), st.floats(0.05, 0.95))
def test_a_response_term_is_never_negative_and_zero_where_both_say_the_same(
    seed: int, temperature: float, kind: Divergence, share: float
) -> None:
    student, teacher = pair(seed)
    assert float(term(student, teacher, kind, temperature=temperature, share=share)) > 0
    same = teacher.clone().requires_grad_()
    found = term(same, teacher, kind, temperature=temperature, share=share)
    found.backward()
    assert same.grad is not None
    assert (
        float(found.detach()) == pytest.approx(0, abs=1e-12)
        and float(same.grad.abs().max()) < 1e-12
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(-50, 50), st.sampled_from(KINDS))
def test_a_constant_added_to_a_tokens_logits_changes_nothing(
    seed: int, constant: float, kind: Divergence
) -> None:
    student, teacher = pair(seed)
    shift = torch.arange(ROWS).double().unsqueeze(-1) * constant
    moved = term(student + shift, teacher - shift, kind, temperature=2.0)
    assert float(moved) == pytest.approx(
        float(term(student, teacher, kind, temperature=2.0)), rel=1e-8
    )


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_near_one_is_the_term_without_temperature(kind: Divergence) -> None:
    student, teacher = pair()
    near = float(term(student, teacher, kind, temperature=1 + 1e-7, share=0.3))
    assert near == pytest.approx(plain(student, teacher, kind, 1.0, 0.3), rel=1e-5)


def test_at_a_high_temperature_the_gradient_is_that_of_matching_centred_logits() -> None:
    """Hinton et al. 2015, section 2.1: T² times their equation 4, (z − v) / N for logits that are zero on average in a row."""
    student, teacher = (logits - logits.mean(dim=-1, keepdim=True) for logits in pair())
    expected = (student - teacher) / VOCABULARY
    student.requires_grad_()
    term(student, teacher, temperature=1e4).backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, expected, atol=1e-3)


def test_js_divided_by_a_vanishing_share_is_the_divergence_on_that_side() -> None:
    """Agarwal et al. 2024: D_JSD(β) / β → KL(teacher ‖ student) as β → 0; by symmetry the reverse as β → 1."""
    student, teacher = pair()
    small = 1e-6
    towards_teacher = float(term(student, teacher, "js", share=small)) / small
    towards_student = float(term(student, teacher, "js", share=1 - small)) / small
    assert towards_teacher == pytest.approx(float(term(student, teacher, "kl")), rel=1e-4)
    assert towards_student == pytest.approx(float(term(student, teacher, "reverse")), rel=1e-4)


def test_js_stays_finite_where_the_others_do_not() -> None:
    """It is at most the entropy of its shares: here ln 2 for each token."""
    student, teacher = torch.tensor([[300.0, 0.0]]).double(), torch.tensor([[0.0, 300.0]]).double()
    assert float(term(student, teacher, "js")) == pytest.approx(math.log(2))
    assert float(term(student, teacher, "kl")) == pytest.approx(300)


def test_tokens_that_the_teacher_rules_out_give_no_nan() -> None:
    student = torch.zeros(1, 3, dtype=torch.float64)
    certain = torch.tensor([[0.0, -math.inf, -math.inf]], dtype=torch.float64)
    teacher = torch.tensor(
        [[0.0, -5000.0, -5000.0]], dtype=torch.float64
    )  # a probability of 0 in numpy
    kinds: tuple[Divergence, ...] = ("kl", "js")  # the reverse one is infinite here
    for kind in kinds:
        leaf = student.clone().requires_grad_()
        found = response(leaf, certain, temperature=1.0, divergence=kind, share=0.3)
        found.backward()
        assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
        assert float(found.detach()) == pytest.approx(
            plain(student, teacher, kind, 1.0, 0.3), rel=1e-10
        )


def test_half_precision_logits_are_compared_in_float32() -> None:
    student, teacher = (logits.to(torch.bfloat16) for logits in pair())
    logprobs = teacher.float().log_softmax(-1)
    found = response(student, logprobs, temperature=2.0, divergence="kl", share=0.5)
    wide = response(
        student.double(), logprobs.double(), temperature=2.0, divergence="kl", share=0.5
    )
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(wide), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_takes_no_precision(kind: Divergence) -> None:
    student, teacher = (logits.float() for logits in pair())

    def all_ways() -> list[Tensor]:
        mean = ensemble([teacher, student], [1.0, 2.0], temperature=2.0, kind="logprobs")
        top = mean.topk(3)
        return [
            response(student, mean, temperature=2.0, divergence=kind, share=0.3),
            response_top_k(
                student, top.indices, top.values, temperature=2.0, divergence=kind, share=0.3
            ),
        ]

    plain = all_ways()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = all_ways()
    assert all(
        one.dtype == torch.float32 and torch.equal(one, other)
        for one, other in zip(found, plain, strict=True)
    )


def test_a_sum_over_micro_batches_is_the_sum_over_the_batch() -> None:
    student, teacher = pair()
    for kind in KINDS:
        parts = [
            float(term(student[rows], teacher[rows], kind, temperature=2.0))
            for rows in (slice(0, 1), slice(1, None))
        ]
        assert sum(parts) == pytest.approx(
            float(term(student, teacher, kind, temperature=2.0)), rel=1e-12
        )
    nothing = term(student[:0].requires_grad_(), teacher[:0])
    assert float(nothing.detach()) == 0 and nothing.requires_grad


# --- the likeliest tokens and a bucket for the rest


def kept(
    student: Tensor, teacher: Tensor, k: int, kind: Divergence = "kl", temperature: float = 2.0
) -> float:
    logprobs, ids = (teacher / temperature).log_softmax(-1).topk(k)
    return float(
        response_top_k(student, ids, logprobs, temperature=temperature, divergence=kind, share=0.3)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_kept_are_the_full_term(kind: Divergence) -> None:
    student, teacher = pair()
    full = float(term(student, teacher, kind, temperature=2.0, share=0.3))
    assert kept(student, teacher, VOCABULARY, kind) == pytest.approx(full, rel=1e-10)
    assert kept(student, teacher, VOCABULARY - 1, kind) == pytest.approx(
        full, rel=1e-10
    )  # the bucket is one token


@pytest.mark.parametrize("kind", KINDS)
def test_kept_tokens_and_the_bucket_are_two_plain_distributions(kind: Divergence) -> None:
    student, teacher = pair()
    order = teacher.argsort(dim=-1, descending=True)
    q, p = (
        np.take_along_axis(softmax(logits.numpy() / 2.0, axis=-1), order.numpy(), axis=-1)
        for logits in (student, teacher)
    )
    coarse_q, coarse_p = (
        np.concatenate([x[:, :3], x[:, 3:].sum(axis=-1, keepdims=True)], axis=-1) for x in (q, p)
    )
    expected = plain(
        torch.tensor(np.log(coarse_q)) * 2.0, torch.tensor(np.log(coarse_p)) * 2.0, kind, 2.0, 0.3
    )
    assert kept(student, teacher, 3, kind) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS))
def test_fewer_kept_tokens_never_show_a_larger_divergence(seed: int, kind: Divergence) -> None:
    """The data-processing inequality, for all three."""
    student, teacher = pair(seed)
    shown = [kept(student, teacher, k, kind) for k in (1, 2, 4, VOCABULARY)]
    assert all(less <= more + 1e-9 for less, more in pairwise(shown))
    assert shown[0] >= 0


def test_logprobs_rounded_to_sixteen_bits_leave_the_bucket_finite() -> None:
    """A sure teacher's kept probabilities may then add up to 1 or more."""
    student, teacher = pair(scale=12.0)
    logprobs, ids = teacher.log_softmax(-1).topk(3)
    rounded = logprobs.half() * 0.999
    assert bool((rounded.float().exp().sum(-1) >= 1).any())
    student.requires_grad_()
    for kind in KINDS:
        found = response_top_k(student, ids, rounded, temperature=1.0, divergence=kind, share=0.5)
        found.backward()
        assert (
            student.grad is not None
            and bool(student.grad.isfinite().all())
            and 0 <= float(found.detach()) < 1e4
        )


def test_logprobs_that_rounding_left_short_of_one_are_normalised_again() -> None:
    student, teacher = pair()
    logprobs, ids = teacher.log_softmax(-1).topk(VOCABULARY)
    short = response_top_k(
        student, ids, logprobs - 0.01, temperature=1.0, divergence="kl", share=0.5
    )
    assert float(short) == pytest.approx(float(term(student, teacher)))


# --- several teachers


def test_an_ensemble_of_logprobs_is_the_renormalised_geometric_mean() -> None:
    first, second = pair()
    p, q = (softmax(logits.numpy() / 2.0, axis=-1) for logits in (first, second))
    geometric = p**0.25 * q**0.75
    expected = geometric / geometric.sum(axis=-1, keepdims=True)
    found = ensemble([first, second], [1.0, 3.0], temperature=2.0, kind="logprobs")
    assert found.shape == (ROWS, VOCABULARY)
    np.testing.assert_allclose(found.exp().numpy(), expected, rtol=1e-10)


def test_an_ensemble_of_probabilities_is_their_weighted_mean() -> None:
    first, second = pair()
    expected = 0.25 * softmax(first.numpy() / 2.0, axis=-1) + 0.75 * softmax(
        second.numpy() / 2.0, axis=-1
    )
    found = ensemble([first, second], [1.0, 3.0], temperature=2.0, kind="probabilities")
    np.testing.assert_allclose(found.exp().numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("kind", ["logprobs", "probabilities"])
def test_an_ensemble_of_one_is_that_teacher_and_a_weight_near_zero_is_none(kind: Any) -> None:
    first, second = pair()
    alone = (first / 2.0).log_softmax(-1)
    assert torch.allclose(ensemble([first], [7.0], temperature=2.0, kind=kind), alone)
    assert torch.allclose(
        ensemble([first, second], [1.0, 1e-12], temperature=2.0, kind=kind), alone, atol=1e-9
    )
    assert torch.allclose(
        ensemble([first, first + 5], [1.0, 2.0], temperature=2.0, kind=kind), alone
    )
