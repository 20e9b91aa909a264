"""Response term against scipy, finite differences, and the limits that its papers state."""

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

from dsbs.training.distillation import ensemble_logprobs
from dsbs.training.distillation.response import Divergence, response_loss, top_k_response_loss

# trl 1.16.0's mean loss per token by β and temperature (see benchmarks/peers/trl_peer.py).
TRL = {
    (0, 0.5): 5.034701531280624,
    (0, 1.0): 2.337757172934416,
    (0, 4.0): 0.26263073758162064,
    (0.3, 0.5): 0.4107618305914408,
    (0.3, 1.0): 0.3108659711865295,
    (0.3, 4.0): 0.052683834451689796,
    (0.5, 0.5): 0.4711018441468967,
    (0.5, 1.0): 0.35801499266553466,
    (0.5, 4.0): 0.06217563909101957,
    (1, 0.5): 4.985116647833301,
    (1, 1.0): 2.3058656209127846,
    (1, 4.0): 0.2599650981744134,
}
DIVERGENCES: tuple[Divergence, ...] = ("kl", "reverse", "js")
ROWS = 4
VOCABULARY = 9


def logits_pair(seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits (M, V) in float64."""
    torch.manual_seed(seed)
    student = scale * torch.randn(ROWS, VOCABULARY).double()
    return student, scale * torch.randn(ROWS, VOCABULARY).double()


def loss_of(
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence = "kl",
    *,
    temperature: float = 1.0,
    share: float = 0.5,
) -> Tensor:
    """The loss from the teacher's logits."""
    logprobs = (teacher / temperature).log_softmax(dim=-1)
    return response_loss(
        student, logprobs, temperature=temperature, divergence=divergence, share=share
    )


def expected_loss(
    student: Tensor, teacher: Tensor, divergence: Divergence, temperature: float, share: float
) -> float:
    """The definitions, with numpy's probabilities."""
    q, p = (softmax(logits.numpy() / temperature, axis=-1) for logits in (student, teacher))
    mixture = share * p + (1 - share) * q
    divergences: dict[str, Any] = {
        "kl": rel_entr(p, q),
        "reverse": rel_entr(q, p),
        "js": share * rel_entr(p, mixture) + (1 - share) * rel_entr(q, mixture),
    }
    return float(temperature**2 * divergences[divergence].sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_loss_is_its_divergence_times_the_squared_temperature(
    divergence: Divergence, temperature: float
) -> None:
    student, teacher = logits_pair()
    loss = loss_of(student, teacher, divergence, temperature=temperature, share=0.3)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    expected = expected_loss(student, teacher, divergence, temperature, 0.3)
    assert float(loss) == pytest.approx(expected, rel=1e-10)


def published_logits() -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits (5, 7), as in benchmarks/peers/trl_peer.py."""
    positions = torch.arange(42, dtype=torch.float64)
    student = (3 * torch.sin(positions)).view(6, 7)
    teacher = (3 * torch.cos(1.7 * positions)).view(6, 7)
    return student[:5], teacher[:5]  # the last token is padding there


@pytest.mark.parametrize(("share", "temperature"), TRL)
def test_the_loss_is_that_of_trl_times_the_squared_temperature(
    share: float, temperature: float
) -> None:
    """trl's mean per token of generalized_jsd_loss, printed by benchmarks/peers/trl_peer.py."""
    divergence: Divergence = "js"
    if share in (0, 1):
        divergence = "reverse" if share else "kl"
        loss = loss_of(*published_logits(), divergence, temperature=temperature)
    else:
        loss = loss_of(*published_logits(), divergence, temperature=temperature, share=share)
    expected = TRL[share, temperature] * temperature**2
    assert float(loss) / 5 == pytest.approx(expected, rel=1e-6)


def test_the_loss_is_torchtunes_forward_kl_without_the_teachers_entropy() -> None:
    """torchtune.modules.loss.ForwardKLLoss: −Σ p log q, a mean over the tokens that count.

    https://meta-pytorch.org/torchtune/0.4/tutorials/llama_kd_tutorial.html
    """
    student, teacher = (logits.numpy() for logits in published_logits())
    p = softmax(teacher, axis=-1)
    cross_entropy = -(p * np.log(softmax(student, axis=-1))).sum(-1).mean()
    entropy = -(p * np.log(p)).sum(-1).mean()
    loss = float(loss_of(*published_logits())) / 5
    assert loss == pytest.approx(float(cross_entropy - entropy), rel=1e-6)


def test_js_with_equal_shares_is_the_squared_jensen_shannon_distance() -> None:
    student, teacher = logits_pair()
    probabilities = [softmax(logits.numpy(), axis=-1) for logits in (student, teacher)]
    expected = np.square(jensenshannon(*probabilities, axis=-1)).sum()
    assert float(loss_of(student, teacher, "js")) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_gradient_equals_finite_differences(divergence: Divergence) -> None:
    student, teacher = logits_pair()
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: loss_of(s, teacher, divergence, temperature=2.0, share=0.3), student
    )
    logprobs, ids = (teacher / 2).log_softmax(-1).topk(3)
    assert torch.autograd.gradcheck(
        lambda s: top_k_response_loss(
            s, ids, logprobs, temperature=2.0, divergence=divergence, share=0.3
        ),
        student,
    )


def test_the_teacher_has_no_gradient() -> None:
    student, teacher = logits_pair()
    student.requires_grad_()
    teacher.requires_grad_()
    for divergence in DIVERGENCES:
        loss_of(student, teacher, divergence).backward()
    assert teacher.grad is None
    assert student.grad is not None


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6), st.floats(0.25, 8), st.sampled_from(DIVERGENCES), st.floats(0.05, 0.95)
)
def test_the_loss_is_positive_and_zero_for_equal_distributions(
    seed: int, temperature: float, divergence: Divergence, share: float
) -> None:
    student, teacher = logits_pair(seed)
    assert float(loss_of(student, teacher, divergence, temperature=temperature, share=share)) > 0
    equal = teacher.clone().requires_grad_()
    loss = loss_of(equal, teacher, divergence, temperature=temperature, share=share)
    loss.backward()
    assert equal.grad is not None
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert float(equal.grad.abs().max()) < 1e-12


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(-50, 50), st.sampled_from(DIVERGENCES))
def test_a_constant_added_to_a_tokens_logits_changes_nothing(
    seed: int, constant: float, divergence: Divergence
) -> None:
    student, teacher = logits_pair(seed)
    shift = torch.arange(ROWS).double().unsqueeze(-1) * constant
    shifted = loss_of(student + shift, teacher - shift, divergence, temperature=2.0)
    expected = float(loss_of(student, teacher, divergence, temperature=2.0))
    assert float(shifted) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_temperature_near_one_is_the_loss_without_temperature(divergence: Divergence) -> None:
    student, teacher = logits_pair()
    loss = float(loss_of(student, teacher, divergence, temperature=1 + 1e-7, share=0.3))
    expected = expected_loss(student, teacher, divergence, 1.0, 0.3)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_high_temperature_has_the_gradient_of_matching_centered_logits() -> None:
    """Hinton et al. 2015, section 2.1: T² times equation 4, (z − v) / N for zero-mean logits."""
    student, teacher = (logits - logits.mean(dim=-1, keepdim=True) for logits in logits_pair())
    expected = (student - teacher) / VOCABULARY
    student.requires_grad_()
    loss_of(student, teacher, temperature=1e4).backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, expected, atol=1e-3)


def test_js_divided_by_a_vanishing_share_is_the_divergence_on_that_side() -> None:
    """Agarwal et al. 2024: D_JSD(β) / β → KL(teacher ‖ student) as β → 0; the reverse as β → 1."""
    student, teacher = logits_pair()
    small = 1e-6
    towards_teacher = float(loss_of(student, teacher, "js", share=small)) / small
    towards_student = float(loss_of(student, teacher, "js", share=1 - small)) / small
    assert towards_teacher == pytest.approx(float(loss_of(student, teacher, "kl")), rel=1e-4)
    assert towards_student == pytest.approx(float(loss_of(student, teacher, "reverse")), rel=1e-4)


def test_js_stays_finite_where_kl_does_not() -> None:
    """It is at most the entropy of its shares: here ln 2 for each token."""
    student = torch.tensor([[300.0, 0.0]]).double()
    teacher = torch.tensor([[0.0, 300.0]]).double()
    assert float(loss_of(student, teacher, "js")) == pytest.approx(math.log(2))
    assert float(loss_of(student, teacher, "kl")) == pytest.approx(300)


@pytest.mark.parametrize("divergence", ["kl", "js"])  # reverse is infinite here
def test_tokens_of_probability_zero_give_no_nan(divergence: Divergence) -> None:
    student = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    logprobs = torch.tensor([[0.0, -math.inf, -math.inf]], dtype=torch.float64)
    loss = response_loss(student, logprobs, temperature=1.0, divergence=divergence, share=0.3)
    loss.backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
    numpy_zero = torch.tensor([[0.0, -5000.0, -5000.0]], dtype=torch.float64)
    expected = expected_loss(student.detach(), numpy_zero, divergence, 1.0, 0.3)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-10)


def test_half_precision_logits_are_compared_in_float32() -> None:
    student, teacher = (logits.to(torch.bfloat16) for logits in logits_pair())
    logprobs = teacher.float().log_softmax(-1)
    loss = response_loss(student, logprobs, temperature=2.0, divergence="kl", share=0.5)
    expected = response_loss(
        student.double(), logprobs.double(), temperature=2.0, divergence="kl", share=0.5
    )
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_autocast_does_not_reduce_precision(divergence: Divergence) -> None:
    student, teacher = (logits.float() for logits in logits_pair())

    def losses() -> list[Tensor]:
        mean = ensemble_logprobs(
            [teacher, student], [1.0, 2.0], temperature=2.0, ensemble="logprobs"
        )
        top = mean.topk(3)
        return [
            response_loss(student, mean, temperature=2.0, divergence=divergence, share=0.3),
            top_k_response_loss(
                student,
                top.indices,
                top.values,
                temperature=2.0,
                divergence=divergence,
                share=0.3,
            ),
        ]

    expected = losses()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = losses()
    for loss, expected_value in zip(autocast, expected, strict=True):
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected_value)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_losses_of_micro_batches_add_up(divergence: Divergence) -> None:
    student, teacher = logits_pair()
    total = sum(
        float(loss_of(student[rows], teacher[rows], divergence, temperature=2.0))
        for rows in (slice(0, 1), slice(1, None))
    )
    expected = float(loss_of(student, teacher, divergence, temperature=2.0))
    assert total == pytest.approx(expected, rel=1e-12)


def test_the_loss_of_no_tokens_is_zero_with_a_gradient() -> None:
    student, teacher = logits_pair()
    loss = loss_of(student[:0].requires_grad_(), teacher[:0])
    assert float(loss.detach()) == 0
    assert loss.requires_grad


# --- the K likeliest tokens and a bucket for the rest


def top_k_loss(
    student: Tensor,
    teacher: Tensor,
    k: int,
    divergence: Divergence = "kl",
    temperature: float = 2.0,
) -> float:
    logprobs, ids = (teacher / temperature).log_softmax(-1).topk(k)
    loss = top_k_response_loss(
        student, ids, logprobs, temperature=temperature, divergence=divergence, share=0.3
    )
    return float(loss)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_tokens_or_all_but_one_are_the_full_loss(divergence: Divergence) -> None:
    student, teacher = logits_pair()
    expected = float(loss_of(student, teacher, divergence, temperature=2.0, share=0.3))
    for k in (VOCABULARY, VOCABULARY - 1):
        assert top_k_loss(student, teacher, k, divergence) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_top_tokens_and_the_bucket_are_a_plain_distribution(divergence: Divergence) -> None:
    student, teacher = logits_pair()
    order = teacher.argsort(dim=-1, descending=True).numpy()
    coarse_logits: list[Tensor] = []
    for logits in (student, teacher):
        full = np.take_along_axis(softmax(logits.numpy() / 2.0, axis=-1), order, axis=-1)
        rest = full[:, 3:].sum(axis=-1, keepdims=True)
        coarse = np.concatenate([full[:, :3], rest], axis=-1)
        coarse_logits.append(torch.tensor(np.log(coarse)) * 2.0)
    expected = expected_loss(coarse_logits[0], coarse_logits[1], divergence, 2.0, 0.3)
    assert top_k_loss(student, teacher, 3, divergence) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(DIVERGENCES))
def test_fewer_tokens_never_give_a_larger_divergence(seed: int, divergence: Divergence) -> None:
    """The data-processing inequality, for all three."""
    student, teacher = logits_pair(seed)
    losses = [top_k_loss(student, teacher, k, divergence) for k in (1, 2, 4, VOCABULARY)]
    assert all(fewer <= more + 1e-9 for fewer, more in pairwise(losses))
    assert losses[0] >= 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_log_probabilities_rounded_to_16_bits_leave_the_bucket_finite(
    divergence: Divergence,
) -> None:
    """The top probabilities of a confident teacher may then add up to 1 or more."""
    student, teacher = logits_pair(scale=12.0)
    logprobs, ids = teacher.log_softmax(-1).topk(3)
    rounded = logprobs.half() * 0.999
    assert bool((rounded.float().exp().sum(-1) >= 1).any())
    student.requires_grad_()
    loss = top_k_response_loss(
        student, ids, rounded, temperature=1.0, divergence=divergence, share=0.5
    )
    loss.backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
    assert 0 <= float(loss.detach()) < 1e4


def test_log_probabilities_that_rounding_left_below_one_are_normalized() -> None:
    student, teacher = logits_pair()
    logprobs, ids = teacher.log_softmax(-1).topk(VOCABULARY)
    loss = top_k_response_loss(
        student, ids, logprobs - 0.01, temperature=1.0, divergence="kl", share=0.5
    )
    assert float(loss) == pytest.approx(float(loss_of(student, teacher)))


# --- several teachers


def test_an_ensemble_of_logprobs_is_the_renormalized_geometric_mean() -> None:
    first, second = logits_pair()
    p, q = (softmax(logits.numpy() / 2.0, axis=-1) for logits in (first, second))
    geometric = p**0.25 * q**0.75
    expected = geometric / geometric.sum(axis=-1, keepdims=True)
    logprobs = ensemble_logprobs([first, second], [1.0, 3.0], temperature=2.0, ensemble="logprobs")
    assert logprobs.shape == (ROWS, VOCABULARY)
    np.testing.assert_allclose(logprobs.exp().numpy(), expected, rtol=1e-10)


def test_an_ensemble_of_probabilities_is_their_weighted_mean() -> None:
    first, second = logits_pair()
    p, q = (softmax(logits.numpy() / 2.0, axis=-1) for logits in (first, second))
    logprobs = ensemble_logprobs(
        [first, second], [1.0, 3.0], temperature=2.0, ensemble="probabilities"
    )
    np.testing.assert_allclose(logprobs.exp().numpy(), 0.25 * p + 0.75 * q, rtol=1e-10)


@pytest.mark.parametrize("ensemble", ["logprobs", "probabilities"])
def test_an_ensemble_of_one_is_that_teacher_and_a_weight_of_0_is_none(ensemble: Any) -> None:
    first, second = logits_pair()
    alone = (first / 2.0).log_softmax(-1)

    def combined(logits: list[Tensor], weights: list[float]) -> Tensor:
        return ensemble_logprobs(logits, weights, temperature=2.0, ensemble=ensemble)

    assert torch.allclose(combined([first], [7.0]), alone)
    assert torch.allclose(combined([first, second], [1.0, 1e-12]), alone, atol=1e-9)
    assert torch.allclose(combined([first, first + 5], [1.0, 2.0]), alone)
