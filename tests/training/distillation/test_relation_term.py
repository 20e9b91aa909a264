"""Relation term against explicit loops over pairs and triples, and its invariances."""

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

from dsbs.training.distillation.relation import angle_loss, distance_loss

LOSSES = (distance_loss, angle_loss)
Loss = Callable[[Tensor, Tensor], Tensor]


def spaces(rows: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student (B, 3) and teacher (B, 5) in float64."""
    torch.manual_seed(seed)
    return torch.randn(rows, 3).double(), torch.randn(rows, 5).double()


def relative_distances(points: Tensor) -> np.ndarray:
    distances = pdist(points.numpy())
    return distances / distances.mean()


def test_distances_are_the_huber_mean_over_pairs_of_relative_distances() -> None:
    student, teacher = spaces()
    ours, theirs = (relative_distances(points) for points in (student, teacher))
    loss = distance_loss(student, teacher)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(float(np.mean(huber(1.0, ours - theirs))))


def test_a_far_outlier_counts_linearly_beyond_one() -> None:
    """Equation 6: ½ x² up to 1, |x| − ½ beyond."""
    student = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [200.0]]).double()
    teacher = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]]).double()
    difference = relative_distances(student) - relative_distances(teacher)
    assert np.abs(difference).max() > 1
    expected = np.mean(huber(1.0, difference))
    assert float(distance_loss(student, teacher)) == pytest.approx(float(expected))


def test_angles_are_the_huber_mean_over_triples_of_cosines() -> None:
    student, teacher = spaces()

    def cosine(points: np.ndarray, i: int, j: int, k: int) -> float:
        a = points[i] - points[j]
        b = points[k] - points[j]
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    losses = [
        huber(1.0, cosine(student.numpy(), i, j, k) - cosine(teacher.numpy(), i, j, k))
        for i, j, k in permutations(range(6), 3)
    ]
    loss = angle_loss(student, teacher)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(float(np.mean(losses)))


@pytest.mark.parametrize("loss_of", LOSSES)
def test_the_gradient_equals_finite_differences_and_the_teacher_has_none(
    loss_of: Loss,
) -> None:
    student, teacher = spaces()
    student.requires_grad_()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss_of(s, teacher), student)
    loss_of(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("loss_of", LOSSES)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_scale_rotation_and_shift_of_either_space_do_not_matter(
    loss_of: Loss, seed: int, scale: float
) -> None:
    student, teacher = spaces(seed=seed)
    turn = torch.tensor(ortho_group.rvs(5, random_state=seed))
    turned = scale * teacher @ turn + torch.arange(5)
    expected = float(loss_of(student, teacher))
    assert float(loss_of(student, turned)) == pytest.approx(expected, rel=1e-6)
    assert float(loss_of(scale * student + 1, teacher)) == pytest.approx(expected, rel=1e-6)
    assert expected > 0


@pytest.mark.parametrize("loss_of", LOSSES)
def test_the_order_of_examples_does_not_matter_and_a_similar_space_has_loss_zero(
    loss_of: Loss,
) -> None:
    student, teacher = spaces()
    order = [3, 0, 5, 1, 4, 2]
    assert float(loss_of(student[order], teacher[order])) == pytest.approx(
        float(loss_of(student, teacher))
    )
    wider = torch.cat([2 * student, torch.zeros(6, 4).double()], dim=1)
    assert float(loss_of(student, wider)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss_of", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_examples_give_a_finite_gradient(loss_of: Loss, dtype: torch.dtype) -> None:
    student, teacher = (points.to(dtype) for points in spaces())
    student[1] = student[0]
    teacher[3] = teacher[2]
    student.requires_grad_()
    loss = loss_of(student, teacher)
    loss.backward()
    assert bool(loss.isfinite())
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
    assert 0 < float(student.grad.abs().max()) < 100


@pytest.mark.parametrize("loss_of", LOSSES)
def test_coinciding_examples_give_no_gradient_and_no_nan(loss_of: Loss) -> None:
    _, teacher = spaces()
    student = torch.ones(6, 3, requires_grad=True)
    loss = loss_of(student, teacher.float())
    loss.backward()
    assert bool(loss.isfinite())
    assert student.grad is not None
    assert not student.grad.any()
    spread = spaces()[0].float().requires_grad_()
    loss_of(spread, torch.ones(6, 5)).backward()
    assert spread.grad is not None
    assert bool(spread.grad.isfinite().all())


@pytest.mark.parametrize("loss_of", LOSSES)
def test_autocast_does_not_reduce_precision(loss_of: Loss) -> None:
    student, teacher = (points.float() for points in spaces())
    plain = loss_of(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, plain)


def test_triples_without_an_angle_are_not_counted() -> None:
    student, teacher = spaces(rows=4)
    coinciding = [0, 1, 2, 2]
    ours = student[coinciding]
    theirs = teacher[coinciding]

    def cosine(points: Tensor, i: int, j: int, k: int) -> float:
        return float(torch.cosine_similarity(points[i] - points[j], points[k] - points[j], dim=0))

    expected = [
        huber(1.0, cosine(ours, i, j, k) - cosine(theirs, i, j, k))
        for i, j, k in permutations(range(4), 3)
        if {2, 3} not in ({i, j}, {j, k})
    ]
    assert float(angle_loss(ours, theirs)) == pytest.approx(float(np.mean(expected)))
    assert float(angle_loss(student, teacher)) != pytest.approx(float(np.mean(expected)))


@pytest.mark.parametrize(
    ("loss_of", "rows"),
    [(distance_loss, 0), (distance_loss, 1), (angle_loss, 0), (angle_loss, 1), (angle_loss, 2)],
)
def test_the_loss_of_too_few_examples_is_zero_with_a_gradient(loss_of: Loss, rows: int) -> None:
    student, teacher = spaces(rows)
    student.requires_grad_()
    loss = loss_of(student, teacher)
    loss.backward()
    assert float(loss.detach()) == 0
    assert student.grad is not None
    assert not student.grad.any()
