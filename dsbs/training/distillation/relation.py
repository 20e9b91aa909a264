"""Relation term: distances and angles between a batch's examples, as in a local teacher's space.

Source: Park et al. 2019, arXiv:1904.05068, equations 3 to 6. A space's scale, rotation and width do
not matter, and no projection is learned. The term has no unit.

Shapes: B examples, D and D' dimensions of the student's and the teacher's space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from dsbs.students.card import Head
from dsbs.training.distillation import Term, TermInputs, as_float
from dsbs.training.methods import View

if TYPE_CHECKING:
    from torch import Tensor

    from dsbs.training.encode import PackedBatch


class RelationTerm(Term):
    """Bring the distances and angles between examples towards those of the local teachers."""

    distance: float = Field(1.0, ge=0)
    """Weight of the distances between examples."""
    angle: float = Field(2.0, ge=0)
    """Weight of the angles between examples."""

    is_of_one_pass: ClassVar[bool] = True
    needs_hidden_states: ClassVar[bool] = True
    compares_tokens: ClassVar[bool] = False
    heads: ClassVar[tuple[Head, ...]] = ("text", "labels")
    description: ClassVar[str] = (
        "It also learned how a local teacher relates examples to each other."
    )
    citation: ClassVar[str] = "Park et al., 2019, arXiv:1904.05068"

    @model_validator(mode="after")
    def _has_a_weight(self) -> RelationTerm:
        if not (self.distance or self.angle):
            raise ValueError("relation needs a weight above 0: distance or angle")
        return self

    @property
    def needs_teacher(self) -> bool:
        return True

    def count(self, batch: Mapping[str, PackedBatch], views: Sequence[View]) -> int:
        """Examples of the first view, each once however many targets it has."""
        from dsbs.training.encode import count_examples

        return count_examples(batch, views[0].target)

    def loss(self, inputs: TermInputs) -> Tensor | float:
        """An example is the mean over its tokens of the last layer's states, of the first view's
        input.

        The term relates the examples of one forward pass; a step averages its passes by their
        examples.
        """
        if inputs.first_view is None:
            return 0.0
        student = inputs.student.example_means(-1)
        loss: Tensor | float = 0.0
        for output, share in zip(inputs.teachers, inputs.teacher_shares, strict=True):
            teacher = output.example_means(-1)
            relation: Tensor | float = 0.0
            if self.distance:
                relation = self.distance * distance_loss(student, teacher)
            if self.angle:
                relation = relation + self.angle * angle_loss(student, teacher)
            loss = loss + relation * share
        return loss * (len(student) / max(1, inputs.step.counts[self.title]))


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """student (B, D), teacher (B, D') -> (): mean over pairs of Huber(ψ_s − ψ_t), δ = 1.

    ψ is a pair's Euclidean distance divided by the mean distance of all pairs of the batch in the
    same space. 0 for fewer than 2 examples.
    """
    from torch.nn.functional import huber_loss

    if len(student) < 2:
        return student.sum() * 0
    return huber_loss(_relative_distances(student), _relative_distances(teacher.detach()))


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """student (B, D), teacher (B, D') -> (): mean over triples (i, j, k) of Huber(cos_s − cos_t).

    δ = 1; cos is the cosine of the angle at j between i and k. Triples in which i or k coincides
    with j in either space have no angle and are left out; 0 if no triple remains. Takes memory for
    B² · D and B³ numbers.
    """
    import torch
    from torch.nn.functional import huber_loss

    student_cosines, student_exists = _cosines(student)
    teacher_cosines, teacher_exists = _cosines(teacher.detach())
    same = torch.eye(len(student), dtype=torch.bool, device=student.device)
    counted = student_exists & teacher_exists & ~same
    if not counted.any():
        return student.sum() * 0
    return huber_loss(student_cosines[counted], teacher_cosines[counted])


def _relative_distances(points: Tensor) -> Tensor:
    """(B, D) -> (B(B−1)/2,): pairwise distances with mean 1; all 0 if all examples coincide."""
    import torch
    from torch.nn.functional import pdist

    distances = pdist(as_float(points))  # its gradient is 0, not NaN, where two examples coincide
    return distances / distances.mean().clamp_min(torch.finfo(distances.dtype).tiny)


def _cosines(points: Tensor) -> tuple[Tensor, Tensor]:
    """(B, D) -> cosines (B, B, B) at [j, i, k] of the angle at j, and whether the angle exists."""
    import torch

    points = as_float(points)
    arms = points.unsqueeze(0) - points.unsqueeze(1)
    squares = arms.square().sum(dim=-1)
    exists = squares > 0
    # a length of 0 never enters the root or the quotient, whose gradients would be NaN
    unit = arms / torch.where(exists, squares, 1).sqrt().unsqueeze(-1)
    with torch.autocast(points.device.type, enabled=False):  # it would multiply in 16 bits
        cosines = unit @ unit.transpose(1, 2)
    return cosines, exists.unsqueeze(2) & exists.unsqueeze(1)
