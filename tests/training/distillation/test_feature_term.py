"""Feature term: layer maps and the loss between hidden states."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsbs.training.distillation.feature import direction_loss, feature_loss, layer_map


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
def test_uniform_pairs_layers_of_the_same_relative_depth(
    student: int, teacher: int, expected: list[tuple[int, int]]
) -> None:
    assert layer_map("uniform", student, teacher) == expected


@given(st.integers(1, 48), st.integers(1, 48))
def test_uniform_stays_within_both_models_and_in_order(student: int, teacher: int) -> None:
    pairs = layer_map("uniform", student, teacher)
    assert [student_layer for student_layer, _ in pairs] == list(range(1, student + 1))
    teacher_layers = [teacher_layer for _, teacher_layer in pairs]
    assert teacher_layers == sorted(teacher_layers)
    assert teacher_layers[0] >= 1
    assert teacher_layers[-1] == teacher


def test_last_pairs_the_last_layers_only() -> None:
    assert layer_map("last", 2, 8) == [(2, 8)]


def test_an_explicit_map_is_in_the_students_order() -> None:
    assert layer_map({2: 4, 1: 4}, 2, 4) == [(1, 4), (2, 4)]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({3: 1}, "{3: 1}: the student has layers 1 to 2, no layer 3"),
        ({0: 1}, "the student has layers 1 to 2, no layer 0"),
        ({1: 5}, "{1: 5}: the teacher has layers 1 to 4, no layer 5"),
        ({1: 2, 2: 0}, "{2: 0}: the teacher has layers 1 to 4, no layer 0"),
    ],
)
def test_a_layer_that_does_not_exist_is_named(layers: dict[int, int], message: str) -> None:
    with pytest.raises(ValueError, match="layers: ") as error:
        layer_map(layers, 2, 4)
    assert message in str(error.value)


def states() -> tuple[torch.Tensor, torch.Tensor]:
    """Student's and teacher's hidden states (5, 3) in float64."""
    torch.manual_seed(0)
    return torch.randn(5, 3).double(), torch.randn(5, 3).double()


def test_the_loss_is_the_sum_over_tokens_of_the_mean_squared_difference() -> None:
    student, teacher = states()
    expected = np.square(student.numpy() - teacher.numpy()).mean(axis=1).sum()
    loss = feature_loss(student, teacher)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(float(expected))


def test_the_loss_does_not_depend_on_the_width_and_adds_up_over_tokens() -> None:
    student, teacher = states()
    loss = float(feature_loss(student, teacher))
    twice_as_wide = feature_loss(
        torch.cat([student, student], dim=1), torch.cat([teacher, teacher], dim=1)
    )
    assert float(twice_as_wide) == pytest.approx(loss)
    parts = feature_loss(student[:2], teacher[:2]) + feature_loss(student[2:], teacher[2:])
    assert float(parts) == pytest.approx(loss)


def test_the_gradient_equals_finite_differences_and_the_teacher_has_none() -> None:
    student, teacher = states()
    student.requires_grad_()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: feature_loss(s, teacher), student)
    feature_loss(student, teacher).backward()
    assert teacher.grad is None


def test_half_precision_does_not_overflow() -> None:
    student = torch.full((2, 4), 300.0).half()
    teacher = torch.full((2, 4), -300.0).half()
    assert float(feature_loss(student, teacher)) == pytest.approx(2 * 600.0**2)


def test_the_loss_of_no_tokens_is_zero_with_a_gradient() -> None:
    loss = feature_loss(torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 3))
    assert float(loss.detach()) == 0
    assert loss.requires_grad


def test_directions_are_compared_by_half_the_squared_distance_of_unit_vectors() -> None:
    student, teacher = states()
    units = [
        values / np.sqrt((values**2).sum(axis=1, keepdims=True))
        for values in (student.numpy(), teacher.numpy())
    ]
    expected = ((units[0] - units[1]) ** 2).sum() / 2
    assert float(direction_loss(student, teacher)) == pytest.approx(expected, abs=1e-12)
    assert float(direction_loss(3 * student, teacher)) == pytest.approx(expected, abs=1e-12)
    assert float(direction_loss(student, student)) == pytest.approx(0, abs=1e-12)
