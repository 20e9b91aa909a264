"""Feature terms: which layers meet, and the distance between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsbs.training.distillation.feature import feature, layer_map


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (4, 12, [(1, 3), (2, 6), (3, 9), (4, 12)]),  # TinyBERT's example: g(m) = 3 m
        (2, 6, [(1, 3), (2, 6)]),
        (3, 3, [(1, 1), (2, 2), (3, 3)]),
        (3, 4, [(1, 2), (2, 3), (3, 4)]),
        (4, 2, [(1, 1), (2, 1), (3, 2), (4, 2)]),
    ],
)
def test_uniform_meets_every_layer_with_one_of_the_same_relative_depth(
    student: int, teacher: int, expected: list[tuple[int, int]]
) -> None:
    assert layer_map("uniform", student, teacher) == expected


@given(st.integers(1, 48), st.integers(1, 48))
def test_uniform_stays_within_both_models_and_in_order(student: int, teacher: int) -> None:
    found = layer_map("uniform", student, teacher)
    assert [own for own, _ in found] == list(range(1, student + 1))
    others = [other for _, other in found]
    assert others == sorted(others) and others[0] >= 1 and others[-1] == teacher


def test_last_meets_the_last_layers_alone() -> None:
    assert layer_map("last", 2, 8) == [(2, 8)]


def test_an_explicit_map_is_kept_in_the_students_order() -> None:
    assert layer_map({2: 4, 1: 4}, 2, 4) == [(1, 4), (2, 4)]


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({3: 1}, "{3: 1}: the student has layers 1 to 2, no layer 3"),
        ({0: 1}, "the student has layers 1 to 2, no layer 0"),
        ({1: 5}, "{1: 5}: the teacher has layers 1 to 4, no layer 5"),
        ({1: 2, 2: 0}, "{2: 0}: the teacher has layers 1 to 4, no layer 0"),
    ],
)
def test_a_layer_that_is_not_there_is_named(layers: dict[int, int], said: str) -> None:
    with pytest.raises(ValueError, match="layers: ") as error:
        layer_map(layers, 2, 4)
    assert said in str(error.value)


def test_the_feature_term_is_the_sum_over_tokens_of_the_mean_squared_difference() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    expected = sum(
        np.mean((s - t) ** 2) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)
    )
    found = feature(student, teacher)
    assert found.shape == () and float(found) == pytest.approx(float(expected))
    assert float(
        feature(torch.cat([student, student], dim=1), torch.cat([teacher, teacher], dim=1))
    ) == pytest.approx(float(found))
    assert float(
        feature(student[:2], teacher[:2]) + feature(student[2:], teacher[2:])
    ) == pytest.approx(float(found))


def test_the_feature_terms_gradient_is_that_of_finite_differences_and_the_teacher_takes_none() -> (
    None
):
    torch.manual_seed(0)
    student, teacher = (
        torch.randn(4, 3).double().requires_grad_(),
        torch.randn(4, 3).double().requires_grad_(),
    )
    assert torch.autograd.gradcheck(lambda s: feature(s, teacher), student)
    feature(student, teacher).backward()
    assert teacher.grad is None


def test_hidden_states_of_half_precision_do_not_overflow() -> None:
    student, teacher = torch.full((2, 4), 300.0).half(), torch.full((2, 4), -300.0).half()
    assert float(feature(student, teacher)) == pytest.approx(2 * 600.0**2)


def test_no_tokens_are_zero_with_a_gradient() -> None:
    nothing = feature(torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 3))
    assert float(nothing.detach()) == 0 and nothing.requires_grad
