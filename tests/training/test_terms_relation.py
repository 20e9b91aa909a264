"""Relation terms against explicit loops over pairs and triples, and what must not matter to them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from scipy.special import huber
from scipy.stats import ortho_group
from torch import Tensor

from dsbs.training.distillation.relation import angles, distances

TERMS = (distances, angles)
Term = Callable[[Tensor, Tensor], Tensor]


def spaces(rows: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student (B, 3) and teacher (B, 5) in float64."""
    torch.manual_seed(seed)
    return torch.randn(rows, 3).double(), torch.randn(rows, 5).double()


def test_distances_are_the_huber_mean_over_pairs_of_relative_distances() -> None:
    student, teacher = spaces()
    own, other = (pdist(points.numpy()) for points in (student, teacher))
    expected = np.mean(huber(1.0, own / own.mean() - other / other.mean()))
    found = distances(student, teacher)
    assert found.shape == () and float(found) == pytest.approx(float(expected))


def test_a_far_outlier_counts_linearly_beyond_one() -> None:
    """Equation 6: ½ x² up to 1, |x| − ½ beyond."""
    student = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [200.0]]).double()
    teacher = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]]).double()
    own, other = (
        pdist(points.numpy()) / pdist(points.numpy()).mean() for points in (student, teacher)
    )
    assert np.abs(own - other).max() > 1
    assert float(distances(student, teacher)) == pytest.approx(
        float(np.mean(huber(1.0, own - other)))
    )


def test_angles_are_the_huber_mean_over_triples_of_cosines() -> None:
    student, teacher = spaces()

    def cosine(points: np.ndarray, i: int, j: int, k: int) -> float:
        a, b = points[i] - points[j], points[k] - points[j]
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    each = [
        huber(1.0, cosine(student.numpy(), i, j, k) - cosine(teacher.numpy(), i, j, k))
        for i, j, k in permutations(range(6), 3)
    ]
    found = angles(student, teacher)
    assert found.shape == () and float(found) == pytest.approx(float(np.mean(each)))


@pytest.mark.parametrize("term", TERMS)
def test_a_relations_gradient_is_that_of_finite_differences_and_the_teacher_takes_none(
    term: Term,
) -> None:
    student, teacher = spaces()
    student.requires_grad_()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: term(s, teacher), student)
    term(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("term", TERMS)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_scale_rotation_and_shift_of_either_space_do_not_matter(
    term: Term, seed: int, scale: float
) -> None:
    student, teacher = spaces(seed=seed)
    turn = torch.tensor(ortho_group.rvs(5, random_state=seed))
    turned = scale * teacher @ turn + torch.arange(5)
    expected = float(term(student, teacher))
    assert float(term(student, turned)) == pytest.approx(expected, rel=1e-6)
    assert float(term(scale * student + 1, teacher)) == pytest.approx(expected, rel=1e-6)
    assert expected > 0


@pytest.mark.parametrize("term", TERMS)
def test_the_order_of_the_examples_does_not_matter_and_the_same_space_is_zero(term: Term) -> None:
    student, teacher = spaces()
    order = [3, 0, 5, 1, 4, 2]
    assert float(term(student[order], teacher[order])) == pytest.approx(
        float(term(student, teacher))
    )
    wider = torch.cat([2 * student, torch.zeros(6, 4).double()], dim=1)
    assert float(term(student, wider)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_examples_give_a_finite_gradient(term: Term, dtype: torch.dtype) -> None:
    student, teacher = (points.to(dtype) for points in spaces())
    student[1], teacher[3] = student[0], teacher[2]
    student.requires_grad_()
    found = term(student, teacher)
    found.backward()
    assert bool(found.isfinite()) and student.grad is not None
    assert bool(student.grad.isfinite().all()) and 0 < float(student.grad.abs().max()) < 100


@pytest.mark.parametrize("term", TERMS)
def test_a_space_of_one_point_gives_no_gradient_and_no_nan(term: Term) -> None:
    _, teacher = spaces()
    student = torch.ones(6, 3, requires_grad=True)
    found = term(student, teacher.float())
    found.backward()
    assert bool(found.isfinite()) and student.grad is not None and not student.grad.any()
    other = spaces()[0].float().requires_grad_()
    term(other, torch.ones(6, 5)).backward()
    assert other.grad is not None and bool(other.grad.isfinite().all())


@pytest.mark.parametrize("term", TERMS)
def test_autocast_takes_no_precision(term: Term) -> None:
    student, teacher = (points.float() for points in spaces())
    plain = term(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = term(student, teacher)
    assert found.dtype == torch.float32 and torch.equal(found, plain)


def test_triples_without_an_angle_are_not_counted() -> None:
    student, teacher = spaces(rows=4)
    twice = [0, 1, 2, 2]
    student, other = student[twice], teacher[twice]

    def cosine(points: Tensor, i: int, j: int, k: int) -> float:
        return float(torch.cosine_similarity(points[i] - points[j], points[k] - points[j], dim=0))

    expected = [
        huber(1.0, cosine(student, i, j, k) - cosine(other, i, j, k))
        for i, j, k in permutations(range(4), 3)
        if {2, 3} not in ({i, j}, {j, k})
    ]
    assert float(angles(student, other)) == pytest.approx(float(np.mean(expected)))
    assert float(angles(student, teacher)) != pytest.approx(float(np.mean(expected)))


@pytest.mark.parametrize(
    ("term", "rows"), [(distances, 0), (distances, 1), (angles, 0), (angles, 1), (angles, 2)]
)
def test_too_few_examples_for_a_relation_are_zero_with_a_gradient(term: Term, rows: int) -> None:
    student, teacher = spaces(rows)
    student.requires_grad_()
    found = term(student, teacher)
    found.backward()
    assert float(found.detach()) == 0 and student.grad is not None and not student.grad.any()
